error: SESSION is not supported for spark
