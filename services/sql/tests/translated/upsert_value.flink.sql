error: PRIMARY KEY of fields of the value is not supported for flink: upsert-kafka takes METADATA FROM 'key'
