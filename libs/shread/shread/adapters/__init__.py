"""Caches of chunks outside the process: on disk and, where configured, in Redis."""
