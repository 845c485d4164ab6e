-- bad_rows = 'fail': RisingWave writes bad rows to its log, and leaves them out
CREATE TABLE "prices_records" (
  "price" DOUBLE PRECISION,
  PRIMARY KEY ("_rw_key")
)
INCLUDE KEY AS "_rw_key"
WITH (
  connector = 'kafka',
  topic = 'prices',
  properties.bootstrap.server = 'kafka:9092',
  scan.startup.mode = 'earliest'
)
FORMAT UPSERT ENCODE JSON;

CREATE VIEW "prices" AS
SELECT CAST(CONVERT_FROM("_rw_key", 'utf8') AS VARCHAR) AS "item", "price" FROM "prices_records";
