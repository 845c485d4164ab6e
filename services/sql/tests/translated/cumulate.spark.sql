error: CUMULATE is not supported for spark
