CREATE TABLE sales (
    item VARCHAR NOT NULL, price DOUBLE, "count" INTEGER, exact DECIMAL(10, 2), large HUGEINT, is_new BOOLEAN,
    tags VARCHAR[], place STRUCT(lat DOUBLE, lon DOUBLE), counts MAP(VARCHAR, BIGINT), body BLOB, day DATE,
    ts TIMESTAMP, seen TIMESTAMPTZ,
    customer VARCHAR METADATA FROM 'key',
    partition INTEGER METADATA,
    offset BIGINT METADATA,
    placed TIMESTAMPTZ METADATA FROM 'timestamp',
    amount AS price * "count",
    WATERMARK FOR ts AS ts - INTERVAL '5' SECOND
) WITH (topic = 'sales.v1', format = 'json');
