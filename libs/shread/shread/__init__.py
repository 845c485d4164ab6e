"""Reads records: registered ones from segments through caches, the rest from the tails of their leaders."""
