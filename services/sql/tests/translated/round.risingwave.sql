error: line 2, column 8: ROUND(price, 1) is not supported for risingwave: it rounds a DOUBLE to whole numbers
