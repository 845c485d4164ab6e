CREATE SOURCE IF NOT EXISTS "numbers" (
  "n" BIGINT
)
WITH (
  connector = 'kafka',
  topic = 'numbers',
  properties.bootstrap.server = 'kafka:9092',
  scan.startup.mode = 'earliest'
)
FORMAT PLAIN ENCODE JSON;
