error: CREATE TABLE IF NOT EXISTS is not supported for spark: tables become temporary views
