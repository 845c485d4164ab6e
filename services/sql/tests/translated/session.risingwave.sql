error: SESSION is not supported for risingwave
