error: line 3, column 95: FOR SYSTEM_TIME AS OF the time of an event is not supported for risingwave: it has FOR SYSTEM_TIME AS OF PROCTIME()
