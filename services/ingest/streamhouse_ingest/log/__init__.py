"""The log of each partition: its batches, its registered end, and the files behind it."""
