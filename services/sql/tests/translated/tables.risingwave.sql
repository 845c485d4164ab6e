-- bad_rows = 'fail': RisingWave writes bad rows to its log, and leaves them out
CREATE SOURCE "sales_records" (
  "item" VARCHAR NOT NULL,
  "price" DOUBLE PRECISION,
  "count" INT,
  "exact" NUMERIC(10, 2),
  "large" NUMERIC,
  "is_new" BOOLEAN,
  "tags" VARCHAR[],
  "place" STRUCT<"lat" DOUBLE PRECISION, "lon" DOUBLE PRECISION>,
  "counts" MAP(VARCHAR, BIGINT),
  "body" BYTEA,
  "day" DATE,
  "ts" TIMESTAMP,
  "seen" TIMESTAMPTZ,
  WATERMARK FOR "ts" AS "ts" - INTERVAL '5 SECOND'
)
INCLUDE KEY AS "_rw_key"
INCLUDE PARTITION AS "_rw_partition"
INCLUDE OFFSET AS "_rw_offset"
INCLUDE TIMESTAMP AS "placed"
WITH (
  connector = 'kafka',
  topic = 'sales.v1',
  properties.bootstrap.server = 'kafka:9092',
  scan.startup.mode = 'earliest'
)
FORMAT PLAIN ENCODE JSON;

CREATE VIEW "sales" AS
SELECT "item", "price", "count", "exact", "large", "is_new", "tags", "place", "counts", "body", "day", "ts", "seen", CAST(CONVERT_FROM("_rw_key", 'utf8') AS VARCHAR) AS "customer", CAST("_rw_partition" AS INT) AS "partition", CAST("_rw_offset" AS BIGINT) AS "offset", "placed", "price" * "count" AS "amount" FROM "sales_records";
