"""All nemeses, by name. Importing the modules registers what is in them."""

from tests.faults.nemeses import machine, network, processes, servers, store
from tests.faults.nemesis import NEMESES

__all__ = ["NEMESES", "chosen", "machine", "network", "processes", "servers", "store"]


def chosen(text: str) -> list[str]:
    """Names from a list with commas, or `all`. Raises ValueError for one that nobody knows."""
    names = sorted(NEMESES) if text == "all" else [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in NEMESES]
    if unknown or not names:
        raise ValueError(f"unknown nemesis {', '.join(unknown) or text!r}; known: {', '.join(sorted(NEMESES))}, all")
    return names
