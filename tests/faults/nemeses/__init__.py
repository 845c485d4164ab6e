"""All nemeses, by name. Importing the modules registers what is in them."""

import fnmatch

from tests.faults.nemeses import machine, network, processes, servers, store
from tests.faults.nemesis import NEMESES

__all__ = ["NEMESES", "chosen", "machine", "network", "processes", "servers", "store"]


def chosen(text: str) -> list[str]:
    """Names from a list with commas; `*` in one stands for anything, `all` for all. Raises ValueError for one that
    nobody knows."""
    patterns = ["*"] if text == "all" else [name.strip() for name in text.split(",") if name.strip()]
    unknown = [pattern for pattern in patterns if not fnmatch.filter(NEMESES, pattern)]
    if unknown or not patterns:
        raise ValueError(f"unknown nemesis {', '.join(unknown) or text!r}; known: {', '.join(sorted(NEMESES))}, all")
    return sorted({name for pattern in patterns for name in fnmatch.filter(NEMESES, pattern)})
