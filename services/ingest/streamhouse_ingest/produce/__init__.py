"""Producing: from a request to its acknowledgement."""
