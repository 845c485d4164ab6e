-- format csv: a record is a single line in Flink
CREATE TABLE `readings` (
  `room` STRING,
  `degrees` DOUBLE
) WITH (
  'connector' = 'kafka',
  'topic' = 'readings',
  'properties.bootstrap.servers' = 'kafka:9092',
  'scan.startup.mode' = 'earliest-offset',
  'format' = 'csv',
  'csv.ignore-parse-errors' = 'true',
  'csv.field-delimiter' = ';',
  'csv.quote-character' = '"',
  'csv.null-literal' = ''
);

SELECT
  `room`,
  MAX(`degrees`) AS `hottest`
FROM `readings`
GROUP BY
  `room`;
