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
  "bidder",
  "price"
FROM (
  SELECT
    "auction",
    "bidder",
    "price",
    ROW_NUMBER() OVER (PARTITION BY "auction" ORDER BY "price" DESC NULLS LAST, "ts") AS "_w"
  FROM "bid"
) AS "_t"
WHERE
  "_w" <= 3;

SELECT
  "auction",
  RANK() OVER "w" AS "r",
  DENSE_RANK() OVER "w" AS "d",
  LAG("price") OVER "w" AS "before",
  LEAD("price", 2) OVER "w" AS "later"
FROM "bid"
WINDOW "w" AS (PARTITION BY "auction" ORDER BY "ts");

SELECT
  SUM("price") OVER (PARTITION BY "bidder" ORDER BY "ts" ROWS BETWEEN 9 PRECEDING AND CURRENT ROW) AS "spent"
FROM "bid";
