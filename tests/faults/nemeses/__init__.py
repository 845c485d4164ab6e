"""All nemeses, by name. Importing the modules registers what is in them."""

import difflib
import fnmatch
from collections.abc import Iterator

from tests.faults.nemeses import machine, network, processes, servers, store
from tests.faults.nemesis import HOLD_S, NEMESES

__all__ = ["NEMESES", "chosen", "described", "machine", "network", "processes", "servers", "store"]


def chosen(text: str) -> list[str]:
    """Names from a list with commas; `*` in one stands for anything, `all` for all. Raises ValueError for one that
    nobody knows."""
    patterns = ["*"] if text == "all" else [name.strip() for name in text.split(",") if name.strip()]
    unknown = [pattern for pattern in patterns if not fnmatch.filter(NEMESES, pattern)]
    if unknown or not patterns:
        near = {name for pattern in unknown for name in difflib.get_close_matches(pattern, NEMESES)}
        meant = f"; near: {', '.join(sorted(near))}" if near else ""
        raise ValueError(f"unknown nemesis {', '.join(unknown) or repr(text)}{meant}; `make faults LIST=1` lists all")
    return sorted({name for pattern in patterns for name in fnmatch.filter(NEMESES, pattern)})


def described() -> Iterator[str]:
    """Yields a line for each nemesis: its name, how long it is held, and the first line of its docstring."""
    width = max(map(len, NEMESES))
    for name in sorted(NEMESES):
        summary = (NEMESES[name].__doc__ or "").strip().partition("\n")[0]
        yield f"{name:{width}}  {held(name):>8}  {summary}"


def held(name: str) -> str:
    """Returns how long a nemesis is held, in seconds, as the page writes it: "1-12 s"."""
    return "{:g}-{:g} s".format(*HOLD_S[name])
