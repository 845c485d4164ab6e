CREATE OR REPLACE TEMPORARY VIEW `lines_records` USING kafka OPTIONS (`kafka.bootstrap.servers` 'kafka:9092', `subscribe` 'lines', `startingOffsets` 'earliest');

-- bad_rows = 'fail': a bad row ends the query, which does not name its offset
CREATE OR REPLACE TEMPORARY VIEW `lines` AS
SELECT `line`
FROM (
  SELECT CAST(`value` AS STRING) AS `line`
  FROM (SELECT * FROM `lines_records`)
);

SELECT
  `line`
FROM `lines`
WHERE
  `line` LIKE 'error%';
