CREATE TABLE `bid` (
  `auction` BIGINT,
  `bidder` BIGINT,
  `price` DOUBLE,
  `channel` STRING,
  `tags` ARRAY<STRING>,
  `info` ROW<`page` STRING>,
  `ts` TIMESTAMP(3),
  WATERMARK FOR `ts` AS `ts` - INTERVAL '4' SECOND
) WITH (
  'connector' = 'kafka',
  'topic' = 'bid',
  'properties.bootstrap.servers' = 'kafka:9092',
  'scan.startup.mode' = 'earliest-offset',
  'format' = 'json',
  'json.ignore-parse-errors' = 'false',
  'json.timestamp-format.standard' = 'ISO-8601'
);

SELECT
  TRY_CAST(`channel` AS INT) AS `n`
FROM `bid`;
