"""The shape of the code, held: cores are pure, layers point one way, wiring alone names concrete classes."""

import ast
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SERVICES = {
    name: ROOT / "services" / name / f"streamhouse_{name}" for name in ("ingest", "segmenter", "query", "coordinator")
}
# Pure computation only: no I/O, no clock, no randomness, no event loop.
CORE_MAY_IMPORT = {
    "__future__", "array", "bisect", "collections", "collections.abc", "copy", "dataclasses", "enum", "functools",
    "hashlib", "heapq", "itertools", "json", "math", "operator", "re", "string", "struct", "types", "typing", "zlib",
    "numpy", "numpy.typing", "shformat", "shproto.errors", "shproto.events", "shproto.v1", "shcluster.index",
}  # fmt: skip
LIBS = {
    "shformat": set(),
    "shproto": set(),
    "shruntime": {"shproto"},
    "shstore": {"shruntime", "shproto"},
    "shcluster": {"shruntime", "shproto"},
    "shread": {"shcluster", "shstore", "shruntime", "shproto", "shformat"},
}
OURS = {*LIBS, "streamhouse", "streamhouse_embedded", *(f"streamhouse_{name}" for name in SERVICES)}


def python_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


@functools.cache
def imports_of(path: Path) -> list[tuple[int, str]]:
    """(line, module) of every import, `from package import module` as package, relative ones made absolute."""
    return list(_imports_of(path))


def _imports_of(path: Path) -> Iterator[tuple[int, str]]:
    package = path.relative_to(next(p for p in path.parents if p.name in OURS).parent).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: -node.level]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from shproto import events` imports a module, not a name out of one.
            for name in {f"{module}.{alias.name}" if module in OURS else module for alias in node.names}:
                yield node.lineno, name


def violations(path: Path, allowed: Callable[[str], bool]) -> list[str]:
    shown = path.relative_to(ROOT)
    return [f"{shown}:{line} imports {name}" for line, name in imports_of(path) if not allowed(name)]


def impurities(files: list[Path], own: str = "") -> list[str]:
    """Imports of files of a core that are of neither the package `own` nor pure."""

    def is_pure(module: str) -> bool:
        return (bool(own) and module.startswith(own)) or any(
            module == ok or module.startswith(ok + ".") for ok in CORE_MAY_IMPORT
        )

    return [found for path in files for found in violations(path, is_pure)]


@pytest.mark.parametrize("name", SERVICES)
def test_a_core_is_pure(name: str) -> None:
    core = SERVICES[name] / "core"
    own = f"streamhouse_{name}.core"
    files = python_files(core)
    assert files, f"{core} is empty"
    assert not (found := impurities(files, own)), "\n".join(found)


def test_the_engines_decisions_are_pure() -> None:
    files = [ROOT / "libs/shcluster/shcluster" / f"{name}.py" for name in ("index", "missing_events", "snapshot")]
    core = python_files(ROOT / "libs/shread/shread/core")
    assert core
    assert not (found := impurities(files) + impurities(core, "shread.core")), "\n".join(found)


@pytest.mark.parametrize("name", SERVICES)
def test_only_wiring_names_adapters(name: str) -> None:
    """A concrete class of an adapter is chosen in wiring.py; everything else sees ports."""
    package = f"streamhouse_{name}"
    found = []
    for path in python_files(SERVICES[name]):
        relative = path.relative_to(SERVICES[name])
        if relative.parts[0] in ("adapters", "wiring.py", "__main__.py"):
            continue
        found += violations(path, lambda module: not module.startswith((f"{package}.adapters", "shread.adapters")))
    assert not found, "\n".join(found)


def test_the_read_engine_names_none_of_its_adapters() -> None:
    found = [
        found
        for path in python_files(ROOT / "libs/shread/shread")
        if path.parent.name != "adapters"
        for found in violations(path, lambda module: not module.startswith("shread.adapters"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", SERVICES)
def test_services_do_not_import_each_other(name: str) -> None:
    others = {f"streamhouse_{other}" for other in SERVICES if other != name} | {"streamhouse", "streamhouse_embedded"}
    found = [
        found
        for path in python_files(SERVICES[name])
        for found in violations(path, lambda module: module.split(".")[0] not in others)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", LIBS)
def test_libraries_know_no_service(name: str) -> None:
    allowed = LIBS[name] | {name}
    found = [
        found
        for path in python_files(ROOT / "libs" / name / name)
        for found in violations(path, lambda module: module.split(".")[0] not in OURS - allowed)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", ["client", "ingest", "segmenter", "coordinator"])
def test_the_read_engine_is_under_services_that_read(name: str) -> None:
    """The SDK asks a query service, and stays small."""
    package = ROOT / "client/streamhouse" if name == "client" else SERVICES[name]
    found = [
        found
        for path in python_files(package)
        for found in violations(path, lambda module: module.split(".")[0] != "shread")
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("asyncpg", {"services/coordinator/streamhouse_coordinator/adapters", "embedded/streamhouse_embedded"}),
        ("aioboto3", {"libs/shstore/shstore"}),
        ("botocore", {"libs/shstore/shstore"}),
        ("redis", {"libs/shread/shread/adapters"}),
        ("nameko", {"services/segmenter/streamhouse_segmenter/adapters"}),
        ("eventlet", {"services/segmenter/streamhouse_segmenter"}),
        ("aio_pika", {"services/coordinator/streamhouse_coordinator/adapters"}),
    ],
)
def test_foreign_libraries_stay_in_their_adapters(library: str, homes: set[str]) -> None:
    found = []
    for top in ("libs", "services", "client", "embedded"):
        for path in python_files(ROOT / top):
            relative = path.relative_to(ROOT).as_posix()
            if "/tests/" in relative or any(relative.startswith(home) for home in homes):
                continue
            found += violations(path, lambda module: module.split(".")[0] != library)
    assert not found, "\n".join(found)


def test_the_guard_sees_a_violation(tmp_path: Path) -> None:
    """A check that cannot fail is no check."""
    package = tmp_path / "shformat"
    package.mkdir()
    bad = package / "bad.py"
    bad.write_text("import asyncio\nfrom shproto.v1 import types_pb2\nfrom .inner import x\n")
    assert [name for _, name in imports_of(bad)] == ["asyncio", "shproto.v1", "shformat.inner"]


def test_no_service_decides_itself_what_it_advertises() -> None:
    """`advertised_address` never says 0.0.0.0; `settings.advertise or server.address` did."""
    sources = [*ROOT.glob("services/*/streamhouse_*/**/*.py"), *ROOT.glob("embedded/streamhouse_embedded/**/*.py")]
    assert [str(path) for path in sources if ".advertise" in path.read_text().replace("shruntime.advertise", "")] == []
