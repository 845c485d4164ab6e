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
