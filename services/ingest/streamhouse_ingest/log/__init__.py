"""The log of each partition: what it holds, how far it is registered, and the files behind it."""
