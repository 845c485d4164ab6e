CREATE OR REPLACE TEMPORARY VIEW `lines_records` USING streamhouse OPTIONS (bootstrap 'kafka:9092', topic 'lines');

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
