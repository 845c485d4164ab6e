"""Events survive JSON, and a reader survives events it does not know."""

import json
from dataclasses import fields

import pytest
from shproto import events

pytestmark = pytest.mark.quick

SEGMENT = events.Segment("s", "t", "orders", 1, 2, 3, 4, 5, "key", 6, 7, 8, 9, 10)
SLICE = events.Slice("t", "orders", 1, 2, 3, 4, 5, 6)
RANGE = events.RangeState(1, 2, 3, 4, None, "orphaned", "a", "w")
CHANGE = events.OffsetChange("t", "orders", 1, -1, 5)
SAMPLES: dict[str, object] = {
    "bool": True,
    "str": "text",
    "int": 7,
    "int | None": None,
    "Segment": SEGMENT,
    "tuple[Slice, ...]": (SLICE, SLICE),
    "tuple[OffsetChange, ...]": (CHANGE, CHANGE),
    "tuple[RangeState, ...]": (RANGE, RANGE),
    "tuple[Segment, ...]": (SEGMENT, SEGMENT),
    "tuple[int, ...]": (1, 2),
    "tuple[str, ...]": ("a", "b"),
    "dict[str, list[str]]": {"member": ["orders:1"]},
}


def sample(cls: type[events.Event]) -> events.Event:
    def value(annotation: object) -> object:
        name = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
        plain = str(annotation).replace("shproto.events.", "")
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
