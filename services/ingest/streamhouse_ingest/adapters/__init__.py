"""Adapters of the machine: the files of the write-ahead log."""
