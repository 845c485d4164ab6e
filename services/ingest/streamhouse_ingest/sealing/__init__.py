"""Sealing: open buffers are sealed and announced to the coordinator."""
