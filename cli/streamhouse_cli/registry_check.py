"""Checks registered segments against each other, and against the contents of their objects. Pure."""

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from shproto.model import Range, Segment

Kind = Literal["missing", "damaged", "different", "overlapping", "gap", "unregistered", "outdated", "metadata"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A difference between registry and object store, or inside the registry.

    missing: registered, and not in the store (or cut short there). damaged: bytes fail their checks. different: sound,
    but not as registered. overlapping: two segments claim the same offsets. gap: registered offsets of an epoch that
    no segment holds. unregistered: an object without a registered segment, not noticed by a sweep. outdated: the
    registry is older than the state that the store has seen, or another registry. metadata: rows of the registry
    differ from its events.
    """

    kind: Kind
    what: str
    topic: str = ""
    partition: int = -1
    base_offset: int = -1
    end_offset: int = -1
    object_key: str = ""
    object_at: int = -1


def finding(segment: Segment, kind: Kind, what: str) -> Finding:
    return Finding(
        kind=kind,
        what=what,
        topic=segment.topic,
        partition=segment.partition,
        base_offset=segment.base_offset,
        end_offset=segment.end_offset,
        object_key=segment.object_key,
        object_at=segment.object_at,
    )


def check_partition(
    topic: str,
    partition: int,
    log_start_offset: int,
    ranges: Sequence[Range],
    segments: Iterable[Segment],
) -> list[Finding]:
    """Returns overlaps between segments, and gaps in the registered part of the ranges."""
    ordered = sorted(segments, key=lambda segment: (segment.base_offset, segment.end_offset))
    findings = list(_overlaps(ordered))
    spans = _joined((segment.base_offset, segment.end_offset) for segment in ordered)
    for owned in ranges:
        start = max(owned.start_offset, log_start_offset)
        for base, end in _uncovered(start, owned.registered_end, spans):
            what = f"epoch {owned.epoch} is registered up to {owned.registered_end}, but no segment holds these offsets"
            findings.append(
                Finding(kind="gap", what=what, topic=topic, partition=partition, base_offset=base, end_offset=end)
            )
    return findings


def _overlaps(ordered: Sequence[Segment]) -> Iterator[Finding]:
    furthest: Segment | None = None
    for segment in ordered:
        if furthest is not None and segment.base_offset < furthest.end_offset:
            what = (
                f"segments {furthest.segment_id} and {segment.segment_id} both hold offsets "
                f"{segment.base_offset} to {min(furthest.end_offset, segment.end_offset)} (exclusive)"
            )
            yield finding(segment, "overlapping", what)
        if furthest is None or segment.end_offset > furthest.end_offset:
            furthest = segment


def _joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns ascending spans; spans that touch or overlap are merged."""
    joined: list[tuple[int, int]] = []
    for base, end in spans:
        if joined and base <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((base, end))
    return joined


def _uncovered(start: int, end: int, spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yields the parts of [start, end) outside of the spans, which ascend and do not touch."""
    for base, until in spans:
        if base >= end:
            break
        if base > start:
            yield start, base
        start = max(start, until)
    if start < end:
        yield start, end


def check_contents(segment: Segment, described: Mapping[str, Any]) -> list[Finding]:
    """Returns damage and differences. `described`: the answer of shformat.describe_segment for the segment's bytes."""
    damage = [
        finding(segment, "damaged", f"at byte {item['at']} of the segment: {item['what']}")
        for item in described["damage"]
    ]
    header = described["header"]
    if damage or header is None:
        return damage
    blocks = described["blocks"]
    found = {
        "topic_id": uuid.UUID(header["topic_id"]).hex,
        "partition": header["partition"],
        "epoch": header["epoch"],
        "base_offset": header["base_offset"],
        "end_offset": header["end_offset"],
        "record_count": header["record_count"],
        # The builder takes it from the first record. Later records may be older, so this is no minimum.
        "first_timestamp_ms": blocks[0]["first_timestamp_ms"],
        "max_timestamp_ms": max(block["max_timestamp_ms"] for block in blocks),
    }
    return [
        finding(segment, "different", f"{name} is registered as {getattr(segment, name)}, the object has {value}")
        for name, value in found.items()
        if getattr(segment, name) != value
    ]
