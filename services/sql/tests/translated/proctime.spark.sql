error: line 2, column 77: FOR SYSTEM_TIME AS OF is not supported for spark
