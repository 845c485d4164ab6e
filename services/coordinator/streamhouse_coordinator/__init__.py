"""The control plane: topics, sessions and leases, epochs and ranges, the segment registry, consumer groups, events."""
