-- bad_rows = 'fail': RisingWave writes bad rows to its log, and leaves them out
CREATE SOURCE "bid" (
  "auction" BIGINT,
  "bidder" BIGINT,
  "price" DOUBLE PRECISION,
  "channel" VARCHAR,
  "tags" VARCHAR[],
  "info" STRUCT<"page" VARCHAR>,
  "ts" TIMESTAMP,
  WATERMARK FOR "ts" AS "ts" - INTERVAL '4 SECOND'
)
WITH (
  connector = 'kafka',
  topic = 'bid',
  properties.bootstrap.server = 'kafka:9092',
  scan.startup.mode = 'earliest'
)
FORMAT PLAIN ENCODE JSON;

SELECT
  "auction",
  CAST("price" AS DOUBLE PRECISION) / 2 AS "half",
  CAST("auction" AS DOUBLE PRECISION) / 2 AS "halves",
  "auction" % 7,
  -"price" AS "less",
  (
    "price" + 1
  ) * 2 - 3,
  "channel" || '!' AS "loud",
  CASE WHEN "price" > 100 THEN 'high' WHEN "price" IS NULL THEN NULL ELSE 'low' END AS "class",
  COALESCE("channel", 'none'),
  NULLIF("price", 0),
  UPPER("channel"),
  LOWER("channel"),
  TRIM("channel"),
  SUBSTRING("channel" FROM 2 FOR 3),
  ABS("price"),
  ROUND("price"),
  FLOOR("price"),
  CEIL("price"),
  CAST("price" AS BIGINT),
  CAST("price" AS NUMERIC(10, 2)),
  CAST("price" AS VARCHAR) AS "text",
  "channel" IS DISTINCT FROM 'x',
  "bidder" IS NOT DISTINCT FROM 5,
  EXTRACT(HOUR FROM "ts") AS "hour",
  "ts" + INTERVAL '5 MINUTE' AS "later",
  CAST('2026-01-01 10:00:00' AS TIMESTAMP) AS "fixed",
  CURRENT_TIMESTAMP AS "now",
  "price" BETWEEN 1 AND 2,
  "price" <> 3,
  "price" >= 4,
  "price" <= 5,
  "price" < 6,
  "price" > 7,
  "price" = 8 AND TRUE,
  "info"."page" AS "page"
FROM "bid" AS "b";

SELECT DISTINCT
  "channel"
FROM "bid"
UNION ALL
SELECT
  'it''s'
FROM "bid";

WITH "dear" AS (
  SELECT
    *
  FROM "bid"
  WHERE
    "price" > 100
)
SELECT
  "d"."auction"
FROM "dear" AS "d", (
  SELECT
    "bidder"
  FROM "bid"
) AS "o"
WHERE
  "o"."bidder" = "d"."bidder";
