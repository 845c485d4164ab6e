error: line 2, column 16: ARG_MAX(bidder, price) is not supported for risingwave
