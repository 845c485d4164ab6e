"""Reading: the acknowledged tail and slices of sealed buffers."""
