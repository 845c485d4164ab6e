CREATE TABLE IF NOT EXISTS numbers (n BIGINT) WITH (topic = 'numbers', bad_rows = 'skip');
