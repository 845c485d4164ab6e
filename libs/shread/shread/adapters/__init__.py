"""What the query service keeps outside itself: chunks on disk and, where configured, in Redis."""
