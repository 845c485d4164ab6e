CREATE OR REPLACE TEMPORARY VIEW `sales_records` USING streamhouse OPTIONS (bootstrap 'kafka:9092', topic 'sales.v1');

-- WATERMARK FOR ts AS ts - INTERVAL '5' SECOND: withWatermark of its reader
-- bad_rows = 'fail': a bad row ends the query, which does not name its offset
CREATE OR REPLACE TEMPORARY VIEW `sales` AS
SELECT `item`, `price`, `count`, `exact`, `large`, `is_new`, `tags`, `place`, `counts`, `body`, `day`, `ts`, `seen`, `customer`, `partition`, `offset`, `placed`, `price` * `count` AS `amount`
FROM (
  SELECT `row of the value`.`item` AS `item`, `row of the value`.`price` AS `price`, `row of the value`.`count` AS `count`, `row of the value`.`exact` AS `exact`, `row of the value`.`large` AS `large`, `row of the value`.`is_new` AS `is_new`, `row of the value`.`tags` AS `tags`, `row of the value`.`place` AS `place`, `row of the value`.`counts` AS `counts`, `row of the value`.`body` AS `body`, `row of the value`.`day` AS `day`, `row of the value`.`ts` AS `ts`, `row of the value`.`seen` AS `seen`, CAST(`key` AS STRING) AS `customer`, CAST(`partition` AS INT) AS `partition`, CAST(`offset` AS BIGINT) AS `offset`, CAST(`timestamp` AS TIMESTAMP) AS `placed`
  FROM (SELECT *, FROM_JSON(CAST(`value` AS STRING), '`item` STRING, `price` DOUBLE, `count` INT, `exact` DECIMAL(10, 2), `large` DECIMAL(38, 0), `is_new` BOOLEAN, `tags` ARRAY<STRING>, `place` STRUCT<`lat`: DOUBLE, `lon`: DOUBLE>, `counts` MAP<STRING, BIGINT>, `body` BINARY, `day` DATE, `ts` TIMESTAMP_NTZ, `seen` TIMESTAMP', MAP('mode', 'FAILFAST')) AS `row of the value` FROM `sales_records`)
)
WHERE `item` IS NOT NULL;
