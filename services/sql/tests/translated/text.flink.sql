CREATE TABLE `lines` (
  `line` STRING
) WITH (
  'connector' = 'kafka',
  'topic' = 'lines',
  'properties.bootstrap.servers' = 'kafka:9092',
  'scan.startup.mode' = 'earliest-offset',
  'format' = 'raw'
);

SELECT
  `line`
FROM `lines`
WHERE
  `line` LIKE 'error%';
