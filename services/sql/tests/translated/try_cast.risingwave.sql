error: line 2, column 17: TRY_CAST(channel AS INT) is not supported for risingwave
