"""Nexmark: a stream of persons, auctions and bids, and the queries q0 to q23 over it. See docs/nexmark.md."""
