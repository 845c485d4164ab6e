error: PRIMARY KEY is not supported for spark: it keeps no newest row of a key
