"""An import points down only: engines below, protocols above them, the command line on top; services never meet."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest

from tests.structure.modules import PACKAGES, Modules, our_modules, parsed, within

pytestmark = pytest.mark.quick

LIBRARIES = {"shformat", "shproto", "shruntime", "shstore", "shcluster"}
SERVICES = {"streamhouse_coordinator", "streamhouse_ingest", "streamhouse_segmenter", "streamhouse_query"}
MAY_IMPORT: Mapping[str, set[str]] = {
    "shformat": set(),
    "shproto": set(),
    "shruntime": {"shproto"},
    "shstore": {"shruntime", "shproto"},
    "shcluster": {"shruntime", "shproto"},
    "shread": LIBRARIES,
    "streamhouse": {"shcluster", "shruntime", "shproto", "shformat"},
    "streamhouse_coordinator": LIBRARIES,
    "streamhouse_ingest": LIBRARIES,
    "streamhouse_segmenter": LIBRARIES,
    "streamhouse_query": LIBRARIES | {"shread"},
    "streamhouse_embedded": LIBRARIES | SERVICES | {"shread", "streamhouse"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Exceptional:
    """Modules `importer`, and those in it, import `imported` although no row allows it; `since`: the day it was found.
    Exceptions are only removed: one that is not needed any more fails."""

    importer: str
    imported: str
    since: str
    until: str


UNTIL_CLI = "the command line is a package of its own"
EXCEPTIONS = (
    *(
        Exceptional(importer="streamhouse.cli", imported=imported, since="2026-11-30", until=UNTIL_CLI)
        for imported in sorted(SERVICES | {"streamhouse_embedded", "shstore"})
    ),
    Exceptional(importer="streamhouse.verify", imported="shstore", since="2026-11-30", until=UNTIL_CLI),
)


def upward(
    modules: Modules, may_import: Mapping[str, set[str]] = MAY_IMPORT, exceptions: Sequence[Exceptional] = ()
) -> list[str]:
    """Returns the imports between packages that no row allows."""
    return [
        f"{module.name}:{found.line} imports {found.name}"
        for module in modules.values()
        for found in module.imports
        for package in [found.name.partition(".")[0]]
        if package in may_import and package not in {module.package, *may_import[module.package]}
        if not any(within(module.name, [of.importer]) and package == of.imported for of in exceptions)
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
    assert not (found := upward(our_modules(), exceptions=EXCEPTIONS)), "\n".join(found)


@pytest.mark.parametrize("exception", EXCEPTIONS, ids=lambda of: f"{of.importer} imports {of.imported}")
def test_an_exception_is_needed_and_dated(exception: Exceptional) -> None:
    others = [other for other in EXCEPTIONS if other != exception]
    assert upward(our_modules(), exceptions=others), "remove it: nothing needs it any more"
    assert re.fullmatch(r"20\d\d-[01]\d-[0-3]\d", exception.since) and exception.until


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("shruntime.x", "from shstore import keys"),  # up
        ("streamhouse_query.x", "import streamhouse_ingest.settings"),  # sideways
        ("streamhouse_ingest.x", "def late():\n    from streamhouse import Producer"),  # late
        ("streamhouse_segmenter.x", "if TYPE_CHECKING:\n    import shread"),  # only for types
        ("streamhouse.y", "from streamhouse_coordinator.core import tables"),  # beside the exception
    ],
)
def test_a_planted_import_is_seen(importer: str, source: str) -> None:
    planted = parsed({importer: source})
    assert len(upward(planted, exceptions=EXCEPTIONS)) == 1


def test_what_a_row_or_an_exception_allows_is_no_finding() -> None:
    planted = parsed(
        {"shstore.x": "import shproto.v1", "streamhouse.cli.x": "import streamhouse_ingest", "shread": "import os"}
    )
    assert upward(planted, exceptions=EXCEPTIONS) == []


def test_every_form_of_an_import_is_read() -> None:
    source = "import a.b\nfrom a import b, c\nfrom . import d\nfrom .e import f\nfrom ..g.h import i\n"
    sources = {"p.q.__init__": "", "p.q.x": source, "p.q.d": "", "p.q.e": "", "a.b": "", "p.g.h": ""}
    names = [found.name for found in parsed(sources)["p.q.x"].imports]
    assert names == ["a.b", "a.b", "a", "p.q.d", "p.q.e", "p.g.h"]
