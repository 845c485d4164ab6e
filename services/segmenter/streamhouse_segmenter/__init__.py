"""Turns sealed buffers into segments on the object store, and keeps the store tidy: compaction, retention, orphans."""
