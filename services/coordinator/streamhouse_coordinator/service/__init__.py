"""Commands of the control plane, a transaction each: load rows, let the core decide, append the events with their row
changes."""
