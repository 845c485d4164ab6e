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
  `price` / 2 AS `half`,
  `auction` / 2 AS `halves`,
  `auction` % 7,
  -`price` AS `less`,
  (
    `price` + 1
  ) * 2 - 3,
  `channel` || '!' AS `loud`,
  CASE WHEN `price` > 100 THEN 'high' WHEN `price` IS NULL THEN NULL ELSE 'low' END AS `class`,
  COALESCE(`channel`, 'none'),
  NULLIF(`price`, 0),
  UPPER(`channel`),
  LOWER(`channel`),
  TRIM(`channel`),
  SUBSTRING(`channel`, 2, 3),
  ABS(`price`),
  ROUND(`price`),
  FLOOR(`price`),
  CEIL(`price`),
  CAST(`price` AS BIGINT),
  CAST(`price` AS DECIMAL(10, 2)),
  CAST(`price` AS STRING) AS `text`,
  `channel` IS DISTINCT FROM 'x',
  `bidder` IS NOT DISTINCT FROM 5,
  EXTRACT(HOUR FROM `ts`) AS `hour`,
  `ts` + INTERVAL '5' MINUTE AS `later`,
  CAST('2026-01-01 10:00:00' AS TIMESTAMP_NTZ) AS `fixed`,
  CURRENT_TIMESTAMP() AS `now`,
  `price` BETWEEN 1 AND 2,
  `price` <> 3,
  `price` >= 4,
  `price` <= 5,
  `price` < 6,
  `price` > 7,
  `price` = 8 AND TRUE,
  `info`.`page` AS `page`
FROM `bid` AS `b`;

SELECT DISTINCT
  `channel`
FROM `bid`
UNION ALL
SELECT
  'it\'s'
FROM `bid`;

WITH `dear` AS (
  SELECT
    *
  FROM `bid`
  WHERE
    `price` > 100
)
SELECT
  `d`.`auction`
FROM `dear` AS `d`, (
  SELECT
    `bidder`
  FROM `bid`
) AS `o`
WHERE
  `o`.`bidder` = `d`.`bidder`;
