"""Query service: serves reads from registered segments through a disk cache, and the tail from the leaders."""
