error: line 2, column 8: DATE_TRUNC('HOUR', ts) is not supported for flink
