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

CREATE MATERIALIZED VIEW "dear" AS
SELECT
  "auction",
  "price"
FROM "bid"
WHERE
  "price" > 100;

-- bad_rows = 'fail': RisingWave writes bad rows to its log, and leaves them out
CREATE SOURCE "dear_bids" (
  "auction" BIGINT,
  "price" DOUBLE PRECISION
)
WITH (
  connector = 'kafka',
  topic = 'dear.bids',
  properties.bootstrap.server = 'kafka:9092',
  scan.startup.mode = 'earliest'
)
FORMAT PLAIN ENCODE JSON;

CREATE SINK "dear_sink" AS
SELECT
  "auction",
  "price"
FROM "dear"
WITH (
  connector = 'kafka',
  topic = 'dear.bids',
  properties.bootstrap.server = 'kafka:9092'
)
FORMAT PLAIN ENCODE JSON;
