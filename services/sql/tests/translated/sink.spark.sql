error: CREATE SINK is not supported for spark: its SQL starts no streaming query; write the SELECT with writeStream
