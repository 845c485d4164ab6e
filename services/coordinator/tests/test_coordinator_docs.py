"""docs/events.md and docs/tables.md name every event, table and column, and no others."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from shproto.events import Event, OffsetChange, Slice
from shproto.model import Range, Segment
from streamhouse_coordinator.core.tables import EVENTS, PROJECTIONS, STATE

pytestmark = pytest.mark.quick

DOCS = Path(__file__).parents[3] / "docs"


def rows(page: str) -> dict[str, str]:
    """First cell of each table row -> the rest of it."""
    found = re.findall(r"^\| `(\w+)` \|(.*)\|$", (DOCS / page).read_text(), re.MULTILINE)
    return dict(found)


def test_every_event_and_field_is_documented() -> None:
    documented = rows("events.md")
    envelope = {"position", "stream_id", "type", "payload", "trace_context", "created_ms"}
    assert set(documented) - set(Event.registry) <= envelope
    for name, kind in Event.registry.items():
        named = re.findall(r"`(\w+)`", documented[name].split("|")[0])
        assert [item.name for item in fields(kind)] == named, name
    text = (DOCS / "events.md").read_text()
    assert all(f"`{item.name}`" in text for part in (Segment, Slice, OffsetChange, Range) for item in fields(part))


def test_every_table_and_column_is_documented() -> None:
    documented = rows("tables.md")
    for table in (*PROJECTIONS, *STATE, EVENTS):
        named = re.findall(r"`(\w+)`", documented[table.name])
        missing = [name for name in table.columns if name not in named]
        assert not missing, f"{table.name}: {missing}"
    known = {table.name for table in (*PROJECTIONS, *STATE, EVENTS)}
    assert set(documented) - known == {"event_position", "outbox", "migrations"}
