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
  "channel",
  LENGTH("channel") AS "size",
  COUNT(*) AS "n",
  COUNT(DISTINCT "bidder") FILTER(WHERE
    "price" > 10) AS "many",
  SUM("price") AS "s",
  AVG("price") AS "a",
  MIN("price") AS "low",
  MAX("price") AS "high",
  APPROX_COUNT_DISTINCT("bidder") AS "about"
FROM "bid"
WHERE
  NOT "price" IS NULL AND NOT "channel" IN ('a', 'b')
GROUP BY
  "channel",
  LENGTH("channel")
HAVING
  COUNT(*) > 5 OR COUNT(*) > 3
ORDER BY
  "n" DESC NULLS LAST
LIMIT 10;
