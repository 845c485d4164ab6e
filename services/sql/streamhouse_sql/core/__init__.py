"""Decisions of the SQL service: text to checked statements, names to topics, predicates to ranges. Pure."""
