"""The next step of a reader at an offset. Pure: a function of the index and the offset.

Invariant: a registered record is never stepped over; SkipTo crosses only offsets that no epoch can have used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from shcluster.index import ClusterIndex, PartitionIndex
from shproto.model import Range, RangeStatus, Segment


@dataclass(frozen=True, slots=True)
class ReadSegment:
    """`segment` holds the offset, or the next record."""

    segment: Segment


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadTail:
    """The offset is not registered yet: ask the agent. Nothing at or beyond `end_offset` (None: unknown) may be
    served. `newest`: the range is the partition's last, so that the high watermarks of both are equal. `reason`:
    why a reader without records has to wait; empty for the usual wait for new records."""

    epoch: int
    agent_id: str
    address: str
    end_offset: int | None
    newest: bool
    reason: str


@dataclass(frozen=True, slots=True)
class SkipTo:
    """A known gap between epochs: no record was or will be written here."""

    offset: int


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing can be read before the index changes; an empty reason is the usual wait for new records."""

    reason: str


@dataclass(frozen=True, slots=True)
class BelowStart:
    """The offset lies below the start of the log: the records there were deleted."""

    log_start_offset: int


@dataclass(frozen=True, slots=True)
class BeyondEnd:
    """The offset lies beyond the high watermark, as far as the index knows."""

    high_watermark: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """Offsets [base_offset, end_offset) are gone for good; records go on at next_offset."""

    base_offset: int
    end_offset: int
    next_offset: int
    reason: str
    object_key: str = ""


Step = ReadSegment | ReadTail | SkipTo | Wait | BelowStart | BeyondEnd | Lost


def plan(cluster: ClusterIndex, partition: PartitionIndex, offset: int) -> Step:
    """Returns the next step of a reader that has everything below `offset`."""
    step = _plan(cluster, partition, offset)
    if cluster.missing_position:
        return _of_metadata_that_went_back(cluster, partition, offset, step)
    return step


def _of_metadata_that_went_back(cluster: ClusterIndex, partition: PartitionIndex, offset: int, step: Step) -> Step:
    """Returns the step on metadata that went back: known records are served, and the known end is not taken for the
    end."""
    if not isinstance(step, Wait | ReadTail | BeyondEnd):
        return step
    reason = went_back_reason(cluster, partition.name, offset)
    return replace(step, reason=reason) if isinstance(step, ReadTail) else Wait(reason)


def went_back_reason(cluster: ClusterIndex, name: str, offset: int) -> str:
    """Returns the reason why records from `offset` on are unknown."""
    return (
        f"{name}: the metadata went back: event {cluster.missing_position} was seen, and is not there any more; "
        f"whether there are records from offset {offset} on is unknown until `streamhouse restore`"
    )


def _plan(cluster: ClusterIndex, partition: PartitionIndex, offset: int) -> Step:
    if offset < partition.log_start_offset:
        return BelowStart(partition.log_start_offset)
    # Before the ranges: a registered record is readable, whatever became of its epoch.
    segment = partition.segment_at(offset)
    if segment is not None:
        return _lost_segment(partition, segment) if segment.lost_reason else ReadSegment(segment)
    position = partition.range_position(offset)
    if position < 0:
        return _before_first_range(partition, offset)
    current = partition.ranges[position]
    if offset < current.registered_end:
        return _unnamed(partition, current, offset)
    if current.end_offset is not None and offset >= current.end_offset:
        return _after_end(partition, position, offset)
    if current.status is RangeStatus.LOST:
        return _lost_range(partition, current, offset)
    return _unregistered(cluster, partition, position, offset)


def _lost_segment(partition: PartitionIndex, segment: Segment) -> Lost:
    following = next_readable(partition, segment.end_offset)
    return Lost(
        base_offset=segment.base_offset,
        end_offset=segment.end_offset,
        next_offset=following,
        reason=segment.lost_reason,
        object_key=segment.object_key,
    )


def _lost_range(partition: PartitionIndex, current: Range, offset: int) -> Lost:
    assert current.end_offset is not None, "a lost range has an end"
    reason = (
        f"what agent {current.agent_id} acknowledged in epoch {current.epoch} from offset {current.registered_end} on "
        "and did not upload was declared lost"
    )
    following = next_readable(partition, current.end_offset)
    return Lost(base_offset=current.registered_end, end_offset=current.end_offset, next_offset=following, reason=reason)


def _unnamed(partition: PartitionIndex, current: Range, offset: int) -> Lost:
    """Returns Lost for registered offsets in no segment: only a damaged registry has them. Never passed over in
    silence."""
    after = partition.segment_after(offset)
    end = after.base_offset if after and after.base_offset < current.registered_end else current.registered_end
    return Lost(
        base_offset=offset,
        end_offset=end,
        next_offset=next_readable(partition, end),
        reason="registered, but no segment holds these offsets",
    )


def next_readable(partition: PartitionIndex, offset: int) -> int:
    """Returns the first offset from `offset` on that is neither lost nor in a gap between epochs."""
    while True:
        segment = partition.segment_at(offset)
        if segment is not None:
            if not segment.lost_reason:
                return offset
            offset = segment.end_offset
            continue
        position = partition.range_position(offset)
        if position < 0:
            return partition.ranges[0].start_offset if partition.ranges else offset
        end = partition.ranges[position].end_offset
        if end is None or (offset < end and partition.ranges[position].status is not RangeStatus.LOST):
            return offset
        if offset < end:
            offset = end
        elif position + 1 < len(partition.ranges):
            offset = partition.ranges[position + 1].start_offset
        else:
            return offset


def _before_first_range(partition: PartitionIndex, offset: int) -> Step:
    if partition.ranges:
        return SkipTo(partition.ranges[0].start_offset)
    if offset > partition.log_start_offset:
        return BeyondEnd(partition.log_start_offset)
    return Wait(f"{partition.name} has had no leader yet: no ingest agent has a session")


def _after_end(partition: PartitionIndex, position: int, offset: int) -> Step:
    current = partition.ranges[position]
    assert current.end_offset is not None
    if position + 1 < len(partition.ranges):
        return SkipTo(partition.ranges[position + 1].start_offset)
    if offset > current.end_offset:
        return BeyondEnd(current.end_offset)
    return Wait(f"{partition.name} has no leader: epoch {current.epoch} ended at {offset}, no agent has the next one")


def _unregistered(cluster: ClusterIndex, partition: PartitionIndex, position: int, offset: int) -> Step:
    current = partition.ranges[position]
    newest = position == len(partition.ranges) - 1
    if current.end_offset is None and offset >= current.limit_offset:
        if not newest:
            return SkipTo(partition.ranges[position + 1].start_offset)
        # The leader of an open range may hold more offsets than the feed has announced: ask it.
        if current.status is not RangeStatus.OPEN and offset > current.limit_offset:
            return BeyondEnd(partition.known_end)
    reason = _reason(partition, current, newest)
    if partition.durable_only:
        # Here records count as acknowledged once registered: records only in the leader's log may be given up
        # at a takeover, and their offsets be used again.
        if newest and current.status is RangeStatus.OPEN and offset > current.registered_end:
            return BeyondEnd(current.registered_end)
        return Wait(reason)
    address = cluster.address_of(current.agent_id, current.wal_id) if current.wal_id else ""
    if not address:
        return Wait(reason or _no_session(partition, current))
    return ReadTail(
        epoch=current.epoch,
        agent_id=current.agent_id,
        address=address,
        end_offset=current.end_offset,
        newest=newest,
        reason=reason,
    )


def _reason(partition: PartitionIndex, current: Range, newest: bool) -> str:
    if current.status is RangeStatus.OPEN and newest:
        return ""
    if current.status is RangeStatus.ORPHANED and not current.wal_id:
        return (
            f"{partition.name}: the metadata was restored from a backup, and agents may have records from offset "
            f"{current.registered_end} on in their write-ahead logs; waiting for them to come back, or for "
            "`streamhouse restore --complete`"
        )
    held = f"{partition.name}: epoch {current.epoch} of agent {current.agent_id} is"
    what = f"records from offset {current.registered_end} on"
    if current.status is RangeStatus.SETTLED:
        return f"{held} settled at {current.end_offset}; waiting for its {what} to be uploaded and registered"
    if current.acknowledged_end is not None:
        return (
            f"{held} unsettled: its write-ahead log came back without records up to offset {current.acknowledged_end} "
            f"that it had acknowledged; waiting for the right disk, or for the range to be declared lost"
        )
    return (
        f"{held} unsettled: {what} that it acknowledged may only be in its write-ahead log; "
        "waiting for the agent to come back, or for the range to be declared lost"
    )


def _no_session(partition: PartitionIndex, current: Range) -> str:
    return (
        f"{partition.name}: the leader, agent {current.agent_id} with epoch {current.epoch}, has no session; "
        f"records from offset {current.registered_end} on can not be read now"
    )
