"""Events survive JSON, and a reader survives events it does not know."""

import json
from dataclasses import fields

import pytest
from shproto import events
from shproto.model import Range, RangeStatus, Segment

pytestmark = pytest.mark.quick

SEGMENT = Segment(
    segment_id="s", topic_id="t", topic="orders", partition=1, epoch=2, base_offset=3, end_offset=4, record_count=5,
    object_key="key", object_at=6, size_bytes=7, raw_bytes=8, first_timestamp_ms=9, max_timestamp_ms=10,
)  # fmt: skip
SLICE = events.Slice(
    topic_id="t", topic="orders", partition=1, epoch=2, base_offset=3, end_offset=4, record_count=5, size_bytes=6
)
RANGE = Range(
    epoch=1, start_offset=2, limit_offset=3, registered_end=4, end_offset=None, status=RangeStatus.ORPHANED,
    agent_id="a", wal_id="w",
)  # fmt: skip
CHANGE = events.OffsetChange(topic_id="t", topic="orders", partition=1, offset_before=-1, offset=5)
SAMPLES: dict[str, object] = {
    "bool": True,
    "str": "text",
    "int": 7,
    "int | None": None,
    "Segment": SEGMENT,
    "tuple[Slice, ...]": (SLICE, SLICE),
    "tuple[OffsetChange, ...]": (CHANGE, CHANGE),
    "tuple[Range, ...]": (RANGE, RANGE),
    "tuple[Segment, ...]": (SEGMENT, SEGMENT),
    "tuple[int, ...]": (1, 2),
    "tuple[str, ...]": ("a", "b"),
    "dict[str, list[str]]": {"member": ["orders:1"]},
}


def sample(cls: type[events.Event]) -> events.Event:
    def value(annotation: object) -> object:
        name = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
        plain = str(annotation).replace("shproto.events.", "").replace("shproto.model.", "")
        return SAMPLES[plain] if plain in SAMPLES else SAMPLES[name]

    return cls(**{item.name: value(item.type) for item in fields(cls)})


@pytest.mark.parametrize("name", sorted(events.Event.registry))
def test_json_round_trip(name: str) -> None:
    event = sample(events.Event.registry[name])
    assert event.stream_id
    assert events.event_from_json(name, event.to_json()) == event


def test_unknown_types_and_fields_are_passed_over() -> None:
    assert events.event_from_json("FromTheFuture", "{}") is None
    payload = json.loads(sample(events.TopicDeleted).to_json()) | {"reason": "new field"}
    assert events.event_from_json("TopicDeleted", payload) == sample(events.TopicDeleted)
