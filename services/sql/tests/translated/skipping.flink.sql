CREATE TABLE IF NOT EXISTS `numbers` (
  `n` BIGINT
) WITH (
  'connector' = 'kafka',
  'topic' = 'numbers',
  'properties.bootstrap.servers' = 'kafka:9092',
  'scan.startup.mode' = 'earliest-offset',
  'format' = 'json',
  'json.ignore-parse-errors' = 'true',
  'json.timestamp-format.standard' = 'ISO-8601'
);
