-- bad_rows = 'fail': RisingWave writes bad rows to its log, and leaves them out
CREATE SOURCE "lines_records" (
  "_rw_value" BYTEA
)
WITH (
  connector = 'kafka',
  topic = 'lines',
  properties.bootstrap.server = 'kafka:9092',
  scan.startup.mode = 'earliest'
)
FORMAT PLAIN ENCODE BYTES;

CREATE VIEW "lines" AS
SELECT CONVERT_FROM("_rw_value", 'utf8') AS "line" FROM "lines_records";

SELECT
  "line"
FROM "lines"
WHERE
  "line" LIKE 'error%';
