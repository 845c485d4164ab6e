"""Decisions of the segmenter: pure, no I/O, no clock, no randomness."""
