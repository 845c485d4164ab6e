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

CREATE TABLE `auction` (
  `id` BIGINT,
  `seller` BIGINT,
  `ts` TIMESTAMP(3),
  WATERMARK FOR `ts` AS `ts`
) WITH (
  'connector' = 'kafka',
  'topic' = 'auction',
  'properties.bootstrap.servers' = 'kafka:9092',
  'scan.startup.mode' = 'earliest-offset',
  'format' = 'json',
  'json.ignore-parse-errors' = 'false',
  'json.timestamp-format.standard' = 'ISO-8601'
);

INSERT INTO `auction`
SELECT
  `b`.`auction` AS `id`,
  `b`.`bidder` AS `seller`,
  `b`.`ts`
FROM `bid` AS `b`
LEFT JOIN `auction` AS `a`
  ON `a`.`id` = `b`.`auction`
  AND `b`.`ts` BETWEEN `a`.`ts` AND `a`.`ts` + INTERVAL '1' HOUR;
