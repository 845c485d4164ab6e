"""Decisions of the query service: pure, without I/O, clock or event loop."""
