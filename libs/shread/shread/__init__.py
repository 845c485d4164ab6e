"""How records are read: from segments through caches, and from the tails of their leaders."""
