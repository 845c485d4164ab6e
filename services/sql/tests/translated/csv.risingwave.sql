CREATE SOURCE "readings" (
  "room" VARCHAR,
  "degrees" DOUBLE PRECISION
)
WITH (
  connector = 'kafka',
  topic = 'readings',
  properties.bootstrap.server = 'kafka:9092',
  scan.startup.mode = 'earliest'
)
FORMAT PLAIN ENCODE CSV (without_header = 'true', delimiter = ';');

SELECT
  "room",
  MAX("degrees") AS "hottest"
FROM "readings"
GROUP BY
  "room";
