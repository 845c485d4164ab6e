"""What must hold for varints, snapshots of idempotent producers and events of the control plane."""

from __future__ import annotations

import json
import struct
from random import Random

import numpy as np
from shformat import FormatError
from shformat.varint import VARINT_BYTES_MAX, decode_varints, encode_varints, unzigzag, zigzag
from shproto.events import Event, event_from_json
from streamhouse_ingest.log.producers import (
    BATCHES_REMEMBERED,
    FIRST_EPOCH,
    ProducerState,
    ProducerTable,
    SnapshotError,
    WrittenBatch,
    decode_snapshot,
    encode_snapshot,
)

from tests.fuzz.bytes_mutator import EDGES, mutate_bytes
from tests.fuzz.target import Target, ensure

_COUNT = struct.Struct("<H")

# ---- varints: a declared count, then the section


def check_varints(data: bytes) -> None:
    """decode_varints against the definition of LEB128, one number at a time."""
    if len(data) < _COUNT.size:
        return
    (count,) = _COUNT.unpack_from(data)
    section = data[_COUNT.size :]
    expected = _decode_slowly(section)
    try:
        numbers = decode_varints(memoryview(section), count, "fuzzed", 0)
    except FormatError:
        ensure(expected is None or len(expected) != count, "decode_varints refuses what is well-formed")
        return
    ensure(expected == numbers.tolist(), "decode_varints gives other numbers than LEB128")
    ensure(decode_varints(memoryview(encode_varints(numbers)), count, "again", 0).tolist() == expected, "round trip")
    ensure((zigzag(unzigzag(numbers)) == numbers).all(), "zigzag and unzigzag are not inverse")


def _decode_slowly(section: bytes) -> list[int] | None:
    numbers, value, size = [], 0, 0
    for byte in section:
        value |= (byte & 0x7F) << (7 * size)
        size += 1
        if size > VARINT_BYTES_MAX or value >= 1 << 64:
            return None
        if byte < 0x80:
            numbers.append(value)
            value, size = 0, 0
    return None if size else numbers


def _varint_seeds() -> list[bytes]:
    lists = ([0], [1, 127, 128, 300], [(1 << 64) - 1, 0, 1 << 63], list(range(200)))
    return [_COUNT.pack(len(numbers)) + encode_varints(np.array(numbers, np.uint64)) for numbers in lists]


# ---- producer snapshots


def check_snapshot(data: bytes) -> None:
    """Producers' states or SnapshotError; what is read is written again, and can be taken in."""
    try:
        states = decode_snapshot(data)
    except SnapshotError:
        return
    ensure(all(1 <= len(state.batches) <= BATCHES_REMEMBERED for state in states.values()), "a state without batches")
    ensure(decode_snapshot(encode_snapshot(states)) == states, "a snapshot changes when it is written again")
    table = ProducerTable(producers_max=3)
    table.merge(states)
    table.merge(states)
    fencing = sum(state.producer_epoch > FIRST_EPOCH for state in states.values())  # not forgotten for others
    expected = fencing + min(3, len(states) - fencing)
    ensure(len(table) == expected, "a table holds another number of producers")
    decode_snapshot(table.snapshot(1 << 62))


def _snapshot_seeds() -> list[bytes]:
    batches = tuple(WrittenBatch(10 * i, 10, 100 + 10 * i) for i in range(BATCHES_REMEMBERED))
    states = {number: ProducerState(number, batches[: number + 1]) for number in range(BATCHES_REMEMBERED)}
    return [b"", encode_snapshot(states), encode_snapshot({1: states[0]})]


# ---- events: JSON of [type, payload]


def check_event(data: bytes) -> None:
    """A payload that is a JSON object gives an event, None or a ValueError; an event survives its own JSON."""
    try:
        name, payload = json.loads(data)
    except (ValueError, TypeError, RecursionError):
        return
    if not isinstance(name, str) or not isinstance(payload, dict):
        return
    try:
        event = event_from_json(name, payload)
    except (ValueError, TypeError):  # a missing field is the TypeError of its class, which names both
        return
    if event is not None:
        ensure(event_from_json(name, event.to_json()) == event, "an event changes in its own JSON")


def mutate_event(data: bytes, rng: Random) -> bytes:
    """Another type, or one field of the payload missing, added or of another kind."""
    try:
        name, payload = json.loads(data)
        fields = list(payload)
    except (ValueError, TypeError, RecursionError):
        return mutate_bytes(data, rng)
    match rng.randrange(4):
        case 0:
            name = rng.choice([*Event.registry, "Unknown"])
        case 1 if fields and isinstance(payload, dict):
            del payload[rng.choice(fields)]
        case 2 if fields and isinstance(payload, dict):
            payload[rng.choice([*fields, "segment", "slices", "extra"])] = _json_value(rng, 2)
        case _:
            return mutate_bytes(data, rng)
    return json.dumps([name, payload]).encode()


def _json_value(rng: Random, depth: int) -> object:
    simple: tuple[object, ...] = (None, True, 1.5, "", "x", "\0", rng.choice(EDGES), [], {})
    if depth and rng.random() < 0.3:
        return [_json_value(rng, depth - 1)] if rng.random() < 0.5 else {"topic": _json_value(rng, depth - 1)}
    return rng.choice(simple)


def _event_seeds() -> list[bytes]:
    segment = {
        "segment_id": "s", "topic_id": "00", "topic": "t", "partition": 0, "epoch": 1, "base_offset": 0,
        "end_offset": 1, "record_count": 1, "object_key": "k", "object_at": 0, "size_bytes": 1, "raw_bytes": 1,
        "first_timestamp_ms": 0, "max_timestamp_ms": 0,
    }  # fmt: skip
    part = {name: segment[name] for name in ("topic_id", "topic", "partition", "epoch", "base_offset", "end_offset",
                                             "record_count", "size_bytes")}  # fmt: skip
    sealed = {"buffer_id": "b", "session_id": "s", "agent_id": "a", "wal_id": "w", "slices": [part]}
    events = [
        ["SegmentRegistered", {"segment": segment, "buffer_id": "b"}],
        ["SegmentsCompacted", {"segment": segment, "replaced_segment_ids": ["x", "y"]}],
        ["BufferSealed", sealed],
        ["GroupRebalanced", {"group": "g", "generation": 1, "assignment": {"m": ["t:0"]}}],
    ]
    return [json.dumps(event).encode() for event in events]


TARGETS = (
    Target("varint", check_varints, _varint_seeds, mutate_bytes, size_bytes_max=4096),
    Target("snapshot", check_snapshot, _snapshot_seeds, mutate_bytes, size_bytes_max=4096),
    Target("event", check_event, _event_seeds, mutate_event, size_bytes_max=4096),
)
