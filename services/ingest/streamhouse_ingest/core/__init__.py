"""Decisions of the ingest agent: pure, without I/O, clock, randomness or asyncio."""
