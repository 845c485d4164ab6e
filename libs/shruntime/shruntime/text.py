"""Texts for logs and errors, which are read line by line, and shown on terminals."""

import re

# C0, DEL, C1 and Unicode's line and paragraph separators: they end a line, or control a terminal.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


_UNITS = {"ms": "milliseconds", "bytes": "bytes"}


def escaped(text: str) -> str:
    """Returns `text` with its control characters as in Python's literals (\n, \x1b); everything else unchanged."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def unit_of(name: str) -> str:
    """Returns " of milliseconds" or " of bytes" for the name of an option or argument that has such a unit, else an
    empty text."""
    return next((f" of {_UNITS[word]}" for word in name.split("_") if word in _UNITS), "")
