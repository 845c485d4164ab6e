"""An import points down only: engines below, protocols above them, the command line on top; services never meet."""

from collections.abc import Mapping

import pytest

from tests.structure.modules import PACKAGES, Modules, our_modules, parsed

pytestmark = pytest.mark.quick

LIBRARIES = {"shformat", "shproto", "shruntime", "shstore", "shcluster"}
SERVICES = {
    "streamhouse_coordinator",
    "streamhouse_ingest",
    "streamhouse_segmenter",
    "streamhouse_query",
    "streamhouse_sql",
}
MAY_IMPORT: Mapping[str, set[str]] = {
    "shformat": set(),
    "shproto": set(),
    "shruntime": {"shproto"},
    "shstore": {"shruntime", "shproto"},
    "shcluster": {"shruntime", "shproto", "shformat"},
    "shread": LIBRARIES,
    "streamhouse": {"shcluster", "shruntime", "shproto", "shformat"},
    "streamhouse_coordinator": LIBRARIES,
    "streamhouse_ingest": LIBRARIES,
    "streamhouse_segmenter": LIBRARIES,
    "streamhouse_query": LIBRARIES | {"shread"},
    "streamhouse_sql": LIBRARIES | {"shread"},
    "streamhouse_embedded": LIBRARIES | SERVICES | {"shread", "streamhouse"},
    "streamhouse_cli": LIBRARIES | SERVICES | {"shread", "streamhouse", "streamhouse_embedded"},
}


# `python -m streamhouse` is the command line, which stands above the SDK.
ENTRY_POINTS: Mapping[str, set[str]] = {"streamhouse.__main__": {"streamhouse_cli"}}


def upward(
    modules: Modules,
    may_import: Mapping[str, set[str]] = MAY_IMPORT,
    entry_points: Mapping[str, set[str]] = ENTRY_POINTS,
) -> list[str]:
    """Returns the imports between packages that no row allows."""
    return [
        f"{module.name}:{found.line} imports {found.name}"
        for module in modules.values()
        for found in module.imports
        for package in [found.name.partition(".")[0]]
        if package in may_import
        if package not in {module.package, *may_import[module.package], *entry_points.get(module.name, ())}
    ]


def test_every_package_has_its_row() -> None:
    assert PACKAGES.keys() == MAY_IMPORT.keys()


def test_the_rows_go_upwards() -> None:
    """Each may import what has its row before it, and a service no other."""
    below: set[str] = set()
    for name, may_import in MAY_IMPORT.items():
        assert may_import <= (below - SERVICES if name in SERVICES else below), name
        below.add(name)


def test_imports_point_down() -> None:
    assert not (found := upward(our_modules())), "\n".join(found)


def test_the_entry_points_need_what_they_may_import() -> None:
    found = upward(our_modules(), entry_points={})
    assert len(found) == len(ENTRY_POINTS), "an entry point is not needed any more"


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("shruntime.x", "from shstore import keys"),  # up
        ("streamhouse_query.x", "import streamhouse_ingest.settings"),  # sideways
        ("streamhouse_ingest.x", "def late():\n    from streamhouse import Producer"),  # late
        ("streamhouse_segmenter.x", "if TYPE_CHECKING:\n    import shread"),  # only for types
        ("streamhouse.y", "from streamhouse_cli import main"),  # beside the entry point
    ],
)
def test_a_planted_import_is_seen(importer: str, source: str) -> None:
    planted = parsed({importer: source})
    assert len(upward(planted)) == 1


def test_what_a_row_or_an_entry_point_allows_is_no_finding() -> None:
    planted = parsed(
        {"shstore.x": "import shproto.v1", "streamhouse.__main__": "import streamhouse_cli", "shread": "import os"}
    )
    assert upward(planted) == []


def test_every_form_of_an_import_is_read() -> None:
    source = "import a.b\nfrom a import b, c\nfrom . import d\nfrom .e import f\nfrom ..g.h import i\n"
    sources = {"p.q.__init__": "", "p.q.x": source, "p.q.d": "", "p.q.e": "", "a.b": "", "p.g.h": ""}
    names = [found.name for found in parsed(sources)["p.q.x"].imports]
    assert names == ["a.b", "a.b", "a", "p.q.d", "p.q.e", "p.g.h"]
