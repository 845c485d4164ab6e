CREATE OR REPLACE TEMPORARY VIEW `bid_records` USING streamhouse OPTIONS (bootstrap 'kafka:9092', topic 'bid');

-- WATERMARK FOR ts AS ts - INTERVAL '4' SECOND: withWatermark of its reader
-- bad_rows = 'fail': a bad row ends the query, which does not name its offset
CREATE OR REPLACE TEMPORARY VIEW `bid` AS
SELECT `auction`, `bidder`, `price`, `channel`, `tags`, `info`, `ts`
FROM (
  SELECT `row of the value`.`auction` AS `auction`, `row of the value`.`bidder` AS `bidder`, `row of the value`.`price` AS `price`, `row of the value`.`channel` AS `channel`, `row of the value`.`tags` AS `tags`, `row of the value`.`info` AS `info`, `row of the value`.`ts` AS `ts`
  FROM (SELECT *, FROM_JSON(CAST(`value` AS STRING), '`auction` BIGINT, `bidder` BIGINT, `price` DOUBLE, `channel` STRING, `tags` ARRAY<STRING>, `info` STRUCT<`page`: STRING>, `ts` TIMESTAMP_NTZ', MAP('mode', 'FAILFAST')) AS `row of the value` FROM `bid_records`)
);

SELECT
  `auction`,
  `bidder`,
  `price`
FROM (
  SELECT
    `auction`,
    `bidder`,
    `price`,
    ROW_NUMBER() OVER (PARTITION BY `auction` ORDER BY `price` DESC, `ts` NULLS LAST) AS `_w`
  FROM `bid`
) AS `_t`
WHERE
  `_w` <= 3;

SELECT
  `auction`,
  RANK() OVER `w` AS `r`,
  DENSE_RANK() OVER `w` AS `d`,
  LAG(`price`) OVER `w` AS `before`,
  LEAD(`price`, 2) OVER `w` AS `later`
FROM `bid`
WINDOW `w` AS (PARTITION BY `auction` ORDER BY `ts` NULLS LAST);

SELECT
  SUM(`price`) OVER (
    PARTITION BY `bidder`
    ORDER BY `ts` NULLS LAST
    ROWS BETWEEN 9 PRECEDING AND CURRENT ROW
  ) AS `spent`
FROM `bid`;
