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

-- per_auction is computed where it is read: INSERT INTO a table of yours SELECT from it
CREATE VIEW `per_auction` AS
SELECT
  `window_start`,
  `window_end`,
  `auction`,
  COUNT(*) AS `bids`,
  MAX(`price`) AS `highest`
FROM TABLE(TUMBLE(TABLE `bid`, DESCRIPTOR(`ts`), INTERVAL '10' SECOND))
GROUP BY
  `window_start`,
  `window_end`,
  `auction`;
