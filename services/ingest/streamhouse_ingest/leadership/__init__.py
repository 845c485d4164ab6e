"""Leadership: the session with the coordinator, and the ranges that it grants and takes away."""
