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

CREATE TABLE `rate` (
  `channel` STRING,
  `factor` DOUBLE,
  `ts` TIMESTAMP(3),
  WATERMARK FOR `ts` AS `ts`,
  PRIMARY KEY (`channel`) NOT ENFORCED
) WITH (
  'connector' = 'upsert-kafka',
  'topic' = 'rate',
  'properties.bootstrap.servers' = 'kafka:9092',
  'key.format' = 'raw',
  'value.format' = 'json',
  'value.json.ignore-parse-errors' = 'false',
  'value.json.timestamp-format.standard' = 'ISO-8601',
  'value.fields-include' = 'EXCEPT_KEY'
);

SELECT
  `b`.`auction`,
  `b`.`price` * `r`.`factor` AS `price`
FROM `bid` AS `b`
JOIN `rate` FOR SYSTEM_TIME AS OF `b`.`ts` AS `r`
  ON `b`.`channel` = `r`.`channel`;
