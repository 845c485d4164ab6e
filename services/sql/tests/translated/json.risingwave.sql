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
  JSONB_EXTRACT_PATH_TEXT(CAST("channel" AS JSONB), 'page', 'name') AS "name",
  JSONB_EXTRACT_PATH_TEXT(CAST("channel" AS JSONB), 'x') AS "x"
FROM "bid";
