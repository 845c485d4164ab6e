"""Decisions of a reader: pure, without I/O, clock or event loop."""
