error: line 2, column 77: PROCTIME() is not supported for flink
