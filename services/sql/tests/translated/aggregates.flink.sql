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
  `channel`,
  CHAR_LENGTH(`channel`) AS `size`,
  COUNT(*) AS `n`,
  COUNT(DISTINCT `bidder`) FILTER(WHERE
    `price` > 10) AS `many`,
  SUM(`price`) AS `s`,
  AVG(`price`) AS `a`,
  MIN(`price`) AS `low`,
  MAX(`price`) AS `high`,
  APPROX_COUNT_DISTINCT(`bidder`) AS `about`
FROM `bid`
WHERE
  NOT `price` IS NULL AND NOT `channel` IN ('a', 'b')
GROUP BY
  `channel`,
  CHAR_LENGTH(`channel`)
HAVING
  COUNT(*) > 5 OR COUNT(*) > 3
ORDER BY
  `n` DESC
LIMIT 10;
