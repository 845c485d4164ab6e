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

CREATE MATERIALIZED VIEW "per_auction" AS
SELECT
  "window_start",
  "window_end",
  "auction",
  COUNT(*) AS "bids",
  MAX("price") AS "highest"
FROM TUMBLE("bid", "ts", INTERVAL '10 seconds')
GROUP BY
  "window_start",
  "window_end",
  "auction"
EMIT ON WINDOW CLOSE;
