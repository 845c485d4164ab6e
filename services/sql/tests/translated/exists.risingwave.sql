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
  "b"."price"
FROM "bid" AS "b"
WHERE
  EXISTS(
    SELECT
      1
    FROM "bid" AS "o"
    WHERE
      "o"."auction" = "b"."bidder"
  );
