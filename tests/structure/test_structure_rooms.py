"""Rooms of a service follow each other: a room imports from those before it, never from those behind."""

from collections.abc import Mapping

import pytest

from tests.structure.modules import Modules, our_modules, parsed, within

pytestmark = pytest.mark.quick

INGEST = "streamhouse_ingest"
# Room or module of the ingest agent, lowest first → which of those before it may be imported. `ports` stands between
# the pure modules of `log` and those that use the files: `log` and `ports` are one floor.
ROOMS: Mapping[str, set[str]] = {
    "metrics": set(),
    "settings": set(),
    "log": {"ports"},
    "ports": {"log"},
    "sealing": {"log", "metrics"},
    "produce": {"log", "ports", "metrics", "settings"},
    "reading": {"log", "ports", "metrics", "sealing"},
    "leadership": {"log", "ports", "metrics", "sealing", "produce"},
    "adapters": {"log", "ports"},
}
# What puts the rooms together, and may import all.
TOP = ("agent", "api", "parts", "wiring")


def room_of(name: str) -> str:
    """Returns the room that a module of the agent is in, or the module's own name; "" for the package."""
    return name.removeprefix(INGEST).removeprefix(".").partition(".")[0]


def out_of_order(modules: Modules, rooms: Mapping[str, set[str]] = ROOMS) -> list[str]:
    """Returns the imports between rooms that no row allows, and modules that have no row."""
    found = []
    for module in modules.values():
        room = room_of(module.name)
        if not within(module.name, [INGEST]) or not room or room in TOP:
            continue
        if room not in rooms:
            found.append(f"{module.name} is in no room")
            continue
        for imported in module.imports:
            if within(imported.name, [INGEST]) and room_of(imported.name) not in {room, *rooms[room]}:
                found.append(f"{module.name}:{imported.line} imports {imported.name}")
    return found


def test_rooms_import_those_before_them() -> None:
    assert not (found := out_of_order(our_modules())), "\n".join(found)


def test_every_row_is_needed() -> None:
    """A row that allows more than is used hides the next arrow that goes astray."""
    needed = {
        (room_of(module.name), room_of(imported.name))
        for module in our_modules().values()
        if within(module.name, [INGEST])
        for imported in module.imports
        if within(imported.name, [INGEST]) and room_of(module.name) != room_of(imported.name)
    }
    allowed = {(room, other) for room, others in ROOMS.items() for other in others}
    assert allowed <= needed, sorted(allowed - needed)
    assert set(ROOMS) <= {room_of(name) for name in our_modules() if within(name, [INGEST])}


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("log.logs", "from streamhouse_ingest.sealing.sealer import Sealer"),  # up
        ("sealing.sealer", "from streamhouse_ingest.produce import writer"),  # sideways
        ("produce.topics", "def late():\n    from streamhouse_ingest.leadership.grants import Grants"),  # late
        ("leadership.session", "from streamhouse_ingest.reading.tail import TailReader"),  # a neighbour
        ("metrics", "if TYPE_CHECKING:\n    import streamhouse_ingest.log.logs"),  # only for types
        ("reading.tail", "from streamhouse_ingest.agent import Agent"),  # the top
    ],
)
def test_a_planted_arrow_upwards_is_seen(importer: str, source: str) -> None:
    planted = {
        f"{INGEST}.{name}": ""
        for name in ("log.logs", "sealing.sealer", "produce.writer", "leadership.grants", "reading.tail", "agent")
    }
    planted[f"{INGEST}.{importer}"] = source
    assert len(out_of_order(parsed(planted))) == 1


def test_a_planted_module_without_a_room_is_seen() -> None:
    planted = {f"{INGEST}.{name}": "" for name in ("attic", "log.logs", "wiring", "__init__")}
    assert out_of_order(parsed(planted)) == [f"{INGEST}.attic is in no room"]
