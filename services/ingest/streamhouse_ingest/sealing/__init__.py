"""Sealing: open buffers become sealed ones, and the coordinator hears of them."""
