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
  "w"."window_start",
  "w"."window_time",
  "w"."channel",
  AVG("w"."price") AS "mean"
FROM HOP("bid", "ts", INTERVAL '0.2 seconds', INTERVAL '1000 seconds', INTERVAL '3 seconds') AS "w"
GROUP BY
  "w"."window_start",
  "w"."window_end",
  "w"."window_time",
  "w"."channel";
