"""One transaction per command: load rows, let the core decide, append the events with their row changes."""
