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
  `w`.`window_start`,
  `w`.`window_time`,
  `w`.`channel`,
  AVG(`w`.`price`) AS `mean`
FROM TABLE(HOP(TABLE `bid`, DESCRIPTOR(`ts`), INTERVAL '0.2' SECOND, INTERVAL '1000' SECOND(4), INTERVAL '3' SECOND)) AS `w`
GROUP BY
  `w`.`window_start`,
  `w`.`window_end`,
  `w`.`window_time`,
  `w`.`channel`;
