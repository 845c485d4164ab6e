CREATE OR REPLACE TEMPORARY VIEW `readings_records` USING streamhouse OPTIONS (bootstrap 'kafka:9092', topic 'readings');

-- bad_rows = 'skip': a bad row has NULL in all of its fields
-- format csv: a record is a single line
CREATE OR REPLACE TEMPORARY VIEW `readings` AS
SELECT `room`, `degrees`
FROM (
  SELECT `row of the value`.`room` AS `room`, `row of the value`.`degrees` AS `degrees`
  FROM (SELECT *, FROM_CSV(CAST(`value` AS STRING), '`room` STRING, `degrees` DOUBLE', MAP('mode', 'PERMISSIVE', 'sep', ';', 'quote', '"', 'nullValue', '')) AS `row of the value` FROM `readings_records`)
);

SELECT
  `room`,
  MAX(`degrees`) AS `hottest`
FROM `readings`
GROUP BY
  `room`;
