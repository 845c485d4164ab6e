-- bad_rows = 'fail': RisingWave writes bad rows to its log, and leaves them out
CREATE TABLE "prices" (
  "item" VARCHAR,
  "price" DOUBLE PRECISION,
  PRIMARY KEY ("item")
)
WITH (
  connector = 'kafka',
  topic = 'prices',
  properties.bootstrap.server = 'kafka:9092',
  scan.startup.mode = 'earliest'
)
FORMAT PLAIN ENCODE JSON;
