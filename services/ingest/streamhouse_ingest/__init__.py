"""Ingest agent: takes record batches, acknowledges them from a write-ahead log, hands sealed buffers to segmenters."""
