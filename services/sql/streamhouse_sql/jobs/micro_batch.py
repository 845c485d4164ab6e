"""Boundaries of a micro-batch, as the journal has them, and the pointer of a checkpoint. Pure.

Both are JSON, written by a worker and read by the next one, which may be of another version: nothing that is
read back is used before it is checked. A micro-batch that is run again from its boundaries gives the same rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from shformat.limits import INT64_MAX
from shproto.errors import DataLoss, StatementLimit

VERSION = 1
# Partitions with new records that a micro-batch has room for: 30 bytes each, in an entry of 256 KiB.
RANGES_MAX = 4_000
# Idle partitions are named, too: at most 8 bytes each. Only inputs with event time have any.
IDLE_MAX = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadRange:
    """Offsets [offset_from, offset_to) of a partition of an input, which hold `records` records."""

    input: str
    partition: int
    offset_from: int
    offset_to: int
    records: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Boundaries of micro-batch `number`. `idle`: (input, partition) that hold no watermark back. `output_partitions`:
    of the output topic, which may get more later. `fingerprint`: of the plan that gives the rows."""

    number: int
    ranges: tuple[ReadRange, ...]
    idle: tuple[tuple[str, int], ...]
    now_us: int
    output_partitions: int
    fingerprint: str

    def encode(self) -> bytes:
        """Returns the journal's entry; the number stands beside it."""
        ranges: dict[str, list[list[int]]] = {}
        for item in self.ranges:
            ranges.setdefault(item.input, []).append(
                [item.partition, item.offset_from, item.offset_to - item.offset_from, item.records]
            )
        idle: dict[str, list[int]] = {}
        for name, partition in self.idle:
            idle.setdefault(name, []).append(partition)
        return _encode(
            {
                "version": VERSION,
                "plan": self.fingerprint,
                "now_us": self.now_us,
                "output_partitions": self.output_partitions,
                "ranges": ranges,
                "idle": idle,
            }
        )

    @classmethod
    def decode(cls, number: int, entry: bytes) -> MicroBatch:
        """Returns the micro-batch of a journal's entry. Raises DataLoss."""
        what = f"micro-batch {number} of the journal"
        with _reading(what):
            data = _decode(entry)
            ranges = tuple(
                ReadRange(
                    input=name,
                    partition=_number(partition),
                    offset_from=_number(start),
                    offset_to=_number(start) + _number(width),
                    records=_number(records),
                )
                for name, items in _mapping(data["ranges"]).items()
                for partition, start, width, records in items
            )
            _check(all(item.offset_from < item.offset_to for item in ranges), "an empty range")
            idle = tuple(
                (name, _number(partition)) for name, items in _mapping(data["idle"]).items() for partition in items
            )
            _check(len(idle) <= IDLE_MAX, f"{len(idle)} idle partitions")
            return cls(
                number=number,
                ranges=ranges,
                idle=idle,
                now_us=_number(data["now_us"]),
                output_partitions=_number(data["output_partitions"], least=1),
                fingerprint=_text(data["plan"]),
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class StateObject:
    """An object of a checkpoint with the rows of a state table."""

    table: str
    key: str
    size_bytes: int
    crc32: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InputPosition:
    """Place of an input. `topic_id`: in hex, of the topic that is read under its name. `first_partitions`: that the
    topic had when the job began, for which the program was made. `offsets`: next ones, by partition."""

    topic: str
    topic_id: str
    first_partitions: int
    offsets: Mapping[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """State after micro-batch `number`. `sequences`: of the next record per output partition."""

    number: int
    fingerprint: str
    inputs: Mapping[str, InputPosition]
    sequences: tuple[int, ...] = ()
    objects: tuple[StateObject, ...] = ()
    watermark_us: int | None = field(default=None)

    def encode(self) -> bytes:
        """Returns the pointer that the coordinator keeps."""
        return _encode(
            {
                "version": VERSION,
                "number": self.number,
                "plan": self.fingerprint,
                "inputs": {
                    name: {
                        "topic": place.topic,
                        "topic_id": place.topic_id,
                        "first_partitions": place.first_partitions,
                        "offsets": sorted(place.offsets.items()),
                    }
                    for name, place in self.inputs.items()
                },
                "sequences": self.sequences,
                "objects": [[item.table, item.key, item.size_bytes, item.crc32] for item in self.objects],
                "watermark_us": self.watermark_us,
            }
        )

    @classmethod
    def decode(cls, pointer: bytes) -> Checkpoint:
        """Returns the checkpoint of a pointer. Raises DataLoss."""
        with _reading("the pointer of the checkpoint"):
            data = _decode(pointer)
            watermark_us = data["watermark_us"]
            return cls(
                number=_number(data["number"]),
                fingerprint=_text(data["plan"]),
                inputs={
                    name: InputPosition(
                        topic=_text(place["topic"]),
                        topic_id=_text(place["topic_id"]),
                        first_partitions=_number(place["first_partitions"], least=1),
                        offsets={_number(partition): _number(offset) for partition, offset in place["offsets"]},
                    )
                    for name, place in _mapping(data["inputs"]).items()
                },
                sequences=tuple(map(_number, data["sequences"])),
                objects=tuple(
                    StateObject(
                        table=_text(table), key=_text(key), size_bytes=_number(size_bytes), crc32=_number(crc32)
                    )
                    for table, key, size_bytes, crc32 in data["objects"]
                ),
                watermark_us=None if watermark_us is None else _number(watermark_us, least=-INT64_MAX),
            )


def advanced(inputs: Mapping[str, InputPosition], ranges: Iterable[ReadRange]) -> dict[str, InputPosition]:
    """Returns the places behind a micro-batch with these ranges."""
    offsets = {name: dict(place.offsets) for name, place in inputs.items()}
    for item in ranges:
        offsets[item.input][item.partition] = item.offset_to
    return {name: replace(place, offsets=offsets[name]) for name, place in inputs.items()}


def check_event_time_partitions(partitions: int) -> None:
    """Checks that all partitions of inputs with event time fit into an entry once they are idle. Raises
    StatementLimit."""
    if partitions > IDLE_MAX:
        raise StatementLimit(
            f"the inputs with event time have {partitions} partitions, a job has room for {IDLE_MAX}",
            limit="IDLE_MAX",
            value=partitions,
        )


class _Damaged(Exception):
    """Bytes that no worker has written."""


class _reading:
    """Turns the errors of damaged bytes into DataLoss."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, _Damaged | KeyError | TypeError | ValueError | RecursionError):
            raise DataLoss(f"{self._what} cannot be read: {error}") from error


def _encode(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, separators=(",", ":")).encode()


def _decode(data: bytes) -> Mapping[str, Any]:
    found = _mapping(json.loads(data))
    _check(found.get("version") == VERSION, f"version {found.get('version')!r}, this worker reads {VERSION}")
    return found


def _check(is_right: bool, problem: str) -> None:
    if not is_right:
        raise _Damaged(problem)


def _mapping(value: Any) -> Mapping[str, Any]:
    _check(isinstance(value, dict), "no object")
    return value  # type: ignore[no-any-return]


def _number(value: Any, least: int = 0) -> int:
    _check(type(value) is int and least <= value <= INT64_MAX, f"{value!r:.100} is no number from {least} on")
    return value  # type: ignore[no-any-return]


def _text(value: Any) -> str:
    _check(isinstance(value, str), f"{value!r:.100} is no text")
    return value  # type: ignore[no-any-return]
