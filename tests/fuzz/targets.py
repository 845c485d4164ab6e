"""All fuzz targets by name, loaded only when asked for: what is imported before instrumentation stays unseen."""

from __future__ import annotations

import importlib

from tests.fuzz.target import Target

# Target name -> module with a TARGETS tuple.
MODULES = {
    "batch": "tests.fuzz.formats",
    "wal": "tests.fuzz.formats",
    "segment": "tests.fuzz.formats",
    "varint": "tests.fuzz.values",
    "snapshot": "tests.fuzz.values",
    "event": "tests.fuzz.values",
    "ingest": "tests.fuzz.rpc",
    "query": "tests.fuzz.rpc",
    "coordinator": "tests.fuzz.rpc",
}


def load(name: str) -> Target:
    """The target called `name`. Raises KeyError for an unknown one."""
    module = importlib.import_module(MODULES[name])
    targets: tuple[Target, ...] = module.TARGETS
    return next(target for target in targets if target.name == name)
