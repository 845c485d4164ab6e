error: CUMULATE is not supported for risingwave
