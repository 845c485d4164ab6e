"""The SQL service: runs statements over topics."""
