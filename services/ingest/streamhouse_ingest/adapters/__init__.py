"""What touches the machine: the write-ahead log's files."""
