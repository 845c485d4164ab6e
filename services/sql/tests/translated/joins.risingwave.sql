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

-- bad_rows = 'fail': RisingWave writes bad rows to its log, and leaves them out
CREATE SOURCE "auction" (
  "id" BIGINT,
  "seller" BIGINT,
  "ts" TIMESTAMP,
  WATERMARK FOR "ts" AS "ts"
)
WITH (
  connector = 'kafka',
  topic = 'auction',
  properties.bootstrap.server = 'kafka:9092',
  scan.startup.mode = 'earliest'
)
FORMAT PLAIN ENCODE JSON;

CREATE SINK "into_auction" AS
SELECT
  "b"."auction" AS "id",
  "b"."bidder" AS "seller",
  "b"."ts"
FROM "bid" AS "b"
LEFT JOIN "auction" AS "a"
  ON "a"."id" = "b"."auction"
  AND "b"."ts" BETWEEN "a"."ts" AND "a"."ts" + INTERVAL '1 HOUR'
WITH (
  connector = 'kafka',
  topic = 'auction',
  properties.bootstrap.server = 'kafka:9092'
)
FORMAT PLAIN ENCODE JSON;
