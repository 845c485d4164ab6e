"""Segments and ranges as events, the index and tools share them. Pure: values; readers ignore fields they do not need.

Names and fields are persisted with the events: fields may be added with a default, never renamed. Ids of topics and
write-ahead logs are in hex. Table rows are the coordinator's; messages are made to these shapes in shproto.convert.
"""

from dataclasses import dataclass
from enum import StrEnum


class RangeStatus(StrEnum):
    """Open: a leader may write. Orphaned: the leader's session ended. Settled: the end is known. Lost: declared so."""

    OPEN = "open"
    ORPHANED = "orphaned"
    SETTLED = "settled"
    LOST = "lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Offsets [start_offset, limit_offset) of one partition that one epoch owns.

    Registered segments cover the range up to `registered_end`. `end_offset` is set once the range is settled or lost:
    no offset at or beyond it was acknowledged. `acknowledged_end` is set if the range's log came back without records
    that were acknowledged up to there. `agent_id` and `wal_id` are empty while no agent holds the range, as after a
    restore. `orphaned_ms`: time at which the range lost its leader; 0: never, or not known, as in an index.
    """

    epoch: int
    start_offset: int
    limit_offset: int
    registered_end: int
    end_offset: int | None
    status: RangeStatus
    agent_id: str
    wal_id: str
    acknowledged_end: int | None = None
    orphaned_ms: int = 0

    @property
    def complete(self) -> bool:
        """True if segments cover all of the range."""
        return self.end_offset is not None and self.registered_end >= self.end_offset


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Place of the records [base_offset, end_offset) of one partition: `size_bytes` from byte `object_at` of the object
    `object_key`. With a `lost_reason` the records are gone, and there is no object. `raw_bytes`: before compression."""

    segment_id: str
    topic_id: str
    topic: str
    partition: int
    epoch: int
    base_offset: int
    end_offset: int
    record_count: int
    object_key: str
    object_at: int
    size_bytes: int
    raw_bytes: int
    first_timestamp_ms: int
    max_timestamp_ms: int
    lost_reason: str = ""
