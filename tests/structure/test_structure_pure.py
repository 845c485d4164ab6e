"""Modules that decide are pure: no I/O, clock, randomness or event loop. The list below has all of them."""

from collections.abc import Mapping, Sequence

import pytest

from tests.structure.modules import Module, Modules, our_modules, parsed, within

pytestmark = pytest.mark.quick

# Modules, or packages of which all modules are pure.
PURE = (
    "shcluster.index",
    "shcluster.missing_events",
    "shcluster.snapshot",
    "shformat",
    "shproto.acks",
    "shproto.addresses",
    "shproto.convert",
    "shproto.events",
    "shproto.keys",
    "shproto.limits",
    "shproto.model",
    "shread.core",
    "shruntime.round_robin",
    "shruntime.text",
    "shstore.errors",
    "shstore.keys",
    "shstore.port",
    "shstore.ranges",
    "streamhouse.cluster",
    "streamhouse.core.sync_mismatch",
    "streamhouse.core.kafka_names",
    "streamhouse.core.lag",
    "streamhouse.core.buffer_pool",
    "streamhouse.core.partition_queue",
    "streamhouse.core.producer_batch",
    "streamhouse.core.subscription",
    "streamhouse.errors",
    "streamhouse.sync.signatures",
    "streamhouse_coordinator.core",
    "streamhouse_coordinator.recovery.backup_format",
    "streamhouse_coordinator.recovery.histories",
    "streamhouse_coordinator.recovery.restore_plan",
    "streamhouse_coordinator.recovery.segment_selection",
    "streamhouse_coordinator.recovery.unrecovered_ranges",
    "streamhouse_ingest.leadership.pending_grants",
    "streamhouse_ingest.log.buffer",
    "streamhouse_ingest.log.fences",
    "streamhouse_ingest.log.lease",
    "streamhouse_ingest.log.partition_log",
    "streamhouse_ingest.log.producers",
    "streamhouse_ingest.log.replay",
    "streamhouse_ingest.log.wal_index",
    "streamhouse_ingest.log.wal_tail",
    "streamhouse_ingest.produce.draft",
    "streamhouse_ingest.sealing.sealing",
    "streamhouse_query.core",
    "streamhouse_segmenter.core",
    "streamhouse_sql.core",
    "streamhouse_sql.jobs.micro_batch",
    "streamhouse_sql.jobs.takeover",
    "streamhouse_sql.pgwire.core",
    "streamhouse_sql.ports",
)
# Of the standard library and numpy: computation only.
STANDARD = {
    "__future__", "array", "bisect", "collections", "collections.abc", "copy", "dataclasses", "difflib", "enum",
    "functools", "hashlib", "heapq", "inspect", "itertools", "json", "math", "operator", "re", "string", "struct",
    "types", "typing", "zlib", "numpy", "numpy.typing",
}  # fmt: skip
# What one module computes with beside that: codecs and their contexts per thread, columns for Arrow, the type of mapped
# bytes (the caller maps the file), ids as text.
ALSO: Mapping[str, set[str]] = {
    "shformat.batch_header": {"mmap"},
    "shformat.columns": {"pyarrow"},
    "shformat.compression": {"lz4.block", "threading", "zstandard"},
    "shformat.inspect": {"uuid"},
    "streamhouse_sql.core.protobuf_schema": {"base64", "binascii", "google.protobuf", "google.protobuf.message"},
    "streamhouse_sql.pgwire.core.arguments": {"datetime", "decimal", "uuid"},
}
# Libraries that all modules of a package compute with: the parser of SQL.
LIBRARIES: Mapping[str, set[str]] = {
    "streamhouse_sql.core": {"sqlglot"},
    "streamhouse_sql.pgwire.core": {"sqlglot"},
}
# Ours that pure modules may use as they are: errors and messages, which are values.
VALUES = ("shproto.errors", "shproto.v1")


def libraries_of(module: Module) -> set[str]:
    """Returns the libraries that the module's package computes with."""
    return {library for package, names in LIBRARIES.items() if within(module.name, [package]) for library in names}


def impurities(module: Module, pure: Sequence[str]) -> list[str]:
    """Returns the imports of a module that a pure one has not."""
    return [
        f"{module.name}:{found.line} imports {found.name}"
        for found in module.imports
        if found.name not in STANDARD | ALSO.get(module.name, set())
        and not within(found.name, VALUES)
        and not within(found.name, pure)
        and not within(found.name, libraries_of(module))
    ]


def not_pure(modules: Modules, pure: Sequence[str] = PURE) -> list[str]:
    """Returns what makes listed modules impure, and names in the list that no module has."""
    listed = [module for module in modules.values() if within(module.name, pure) and not within(module.name, VALUES)]
    missing = [f"there is no {name}" for name in pure if not any(within(name_, [name]) for name_ in modules)]
    return [*missing, *(found for module in listed for found in impurities(module, pure))]


def not_listed(modules: Modules, pure: Sequence[str] = PURE) -> list[str]:
    """Returns modules that are as pure as the listed ones, and not listed."""
    return sorted(
        module.name
        for module in modules.values()
        if module.imports and not within(module.name, (*pure, *VALUES)) and not impurities(module, pure)
    )


def test_listed_modules_are_pure() -> None:
    assert not (found := not_pure(our_modules())), "\n".join(found)


def test_pure_modules_are_listed() -> None:
    """So that none loses its purity unseen."""
    assert not (found := not_listed(our_modules())), "\n".join(found)


def test_what_modules_compute_with_is_needed() -> None:
    modules = our_modules()
    for name, also in ALSO.items():
        assert also <= {found.name for found in modules[name].imports}, name
        assert within(name, PURE), name
    for package, names in LIBRARIES.items():
        imported = {
            found.name for module in modules.values() if within(module.name, [package]) for found in module.imports
        }
        assert all(any(within(name, [library]) for name in imported) for library in names), package
        assert within(package, PURE), package


def test_planted_impurities_are_seen() -> None:
    sources = {
        "a.__init__": "",
        "a.core.__init__": "",
        "a.core.clock": "import time",
        "a.core.late": "def now():\n    import random",
        "a.core.other": "from a import shell",
        "a.core.fine": "from a.core import clock\nimport math\nfrom shproto.v1 import types_pb2",
        "a.shell": "import asyncio",
    }
    assert not_pure(parsed(sources), ["a.core"]) == [
        "a.core.clock:1 imports time",
        "a.core.late:2 imports random",
        "a.core.other:1 imports a.shell",
    ]
    assert not_pure(parsed(sources), ["a.core.fine", "a.gone"]) == [
        "there is no a.gone",
        "a.core.fine:1 imports a.core.clock",
    ]


def test_a_planted_module_that_is_not_listed_is_seen() -> None:
    sources = {"a.decides": "from b import also", "b.also": "import math", "b.__init__": "", "a.shell": "import os"}
    assert not_listed(parsed(sources), ["c"]) == ["b.also"]
    assert not_listed(parsed(sources), ["b.also"]) == ["a.decides"]
