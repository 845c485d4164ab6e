"""The protocol's pure part: messages, types, statements about the session, the catalogue."""
