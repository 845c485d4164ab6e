"""Messages of the wire protocol, typed errors and events."""
