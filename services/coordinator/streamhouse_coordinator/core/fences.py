"""Decides on fences of producers: which epoch is the newest, and which older ranges still hide what a producer wrote.
Pure.

Producers' states are encoded by the agents and pass through as bytes.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from shproto.errors import Fenced, InvalidArgument, Overloaded, ProducerFenced
from shproto.limits import SNAPSHOTS_BYTES_MAX

from streamhouse_coordinator.core.sessions import usable
from streamhouse_coordinator.core.tables import LOST, OPEN, ProducerFenceRow, ProducerSnapshotRow, RangeRow


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedFence:
    """A fence as the leader of range `epoch` asks for it. `state`: of the producer in all ranges below `known_epoch`;
    0: there is nothing to be kept."""

    topic_id: str
    partition: int
    epoch: int
    producer_id: int
    producer_epoch: int
    known_epoch: int
    state: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class OlderStates:
    """States of producers at the ends of older ranges, older first, up to range `next_epoch`; each counts for the
    offsets of its range alone. `waits_for`: range `next_epoch`, if its end, or the state there, is not known yet."""

    ends: tuple[tuple[RangeRow, bytes], ...]
    next_epoch: int
    waits_for: RangeRow | None = None


def check_leader(row: RangeRow | None, session_id: str, epoch: int) -> None:
    """Checks that the session leads the range. Raises Fenced."""
    if row is None or row.status != OPEN or row.session_id != session_id:
        raise Fenced(f"epoch {epoch} is not led by this session", offered=epoch)


def raise_epoch(
    asked: AskedFence, held: ProducerFenceRow | None, fence_count: int, fences_max: int
) -> ProducerFenceRow:
    """Returns the fence as it is to be kept. Raises ProducerFenced for an older epoch, Overloaded for one producer too
    many, InvalidArgument for a state of ranges that are not older than the leader's."""
    if asked.known_epoch > asked.epoch:
        raise InvalidArgument(
            f"known_epoch is {asked.known_epoch}, must be at most {asked.epoch}",
            field="known_epoch",
            value=asked.known_epoch,
            limit=asked.epoch,
        )
    if held is None:
        if fence_count >= fences_max:
            raise Overloaded(
                f"{fence_count} producers fence in this partition, the limit producer_fences_per_partition_max is "
                f"{fences_max}",
                limit="producer_fences_per_partition_max",
                value=fence_count,
            )
        # Agents take batches of epoch 1 and above only behind a fence, so older ranges hold nothing of the producer.
        return ProducerFenceRow(
            topic_id=asked.topic_id,
            partition=asked.partition,
            producer_id=asked.producer_id,
            producer_epoch=asked.producer_epoch,
            known_epoch=asked.epoch,
            state=b"",
        )
    if asked.producer_epoch < held.producer_epoch:
        raise ProducerFenced(
            f"producer epoch {asked.producer_epoch}, {held.producer_epoch} has fenced",
            producer_id=asked.producer_id,
            offered=asked.producer_epoch,
            held=held.producer_epoch,
        )
    raised = replace(held, producer_epoch=asked.producer_epoch)
    if asked.known_epoch <= held.known_epoch:
        return raised  # nothing new, or a call that was overtaken
    return replace(raised, known_epoch=asked.known_epoch, state=asked.state)


def older_states(
    fence: ProducerFenceRow, epoch: int, ranges: Sequence[RangeRow], snapshots: Iterable[ProducerSnapshotRow]
) -> OlderStates:
    """Returns the states of the ranges from the fence's known_epoch on and below `epoch`, as far as they are known and
    fit into a message. `ranges`, `snapshots`: of the partition."""
    by_epoch: dict[int, ProducerSnapshotRow] = {}
    rows = {row.epoch: row for row in ranges}
    for snapshot in snapshots:
        newest = by_epoch.get(snapshot.epoch)
        if usable(snapshot, rows.get(snapshot.epoch)) and (newest is None or snapshot.end_offset > newest.end_offset):
            by_epoch[snapshot.epoch] = snapshot
    ends: list[tuple[RangeRow, bytes]] = []
    room_bytes = SNAPSHOTS_BYTES_MAX
    for row in sorted(ranges, key=lambda item: item.epoch):
        if not fence.known_epoch <= row.epoch < epoch:
            continue
        if not _is_known(row, by_epoch):
            return OlderStates(ends=tuple(ends), next_epoch=row.epoch, waits_for=row)
        state = by_epoch[row.epoch].snapshot if row.epoch in by_epoch else b""
        if ends and len(state) > room_bytes:
            return OlderStates(ends=tuple(ends), next_epoch=row.epoch)
        room_bytes -= len(state)
        ends.append((row, state))
    return OlderStates(ends=tuple(ends), next_epoch=epoch)


def _is_known(row: RangeRow, newest: Mapping[int, ProducerSnapshotRow]) -> bool:
    """Returns True if the newest snapshot of the range tells all that its producers wrote to it.

    A snapshot comes with the end of every registered segment, so the newest is complete up to registered_end. Beyond
    that only one at the very end is: the agent has declared it with the end, or announced it.
    """
    if row.status == LOST or row.end_offset == row.registered_end:
        return True
    at_end = newest.get(row.epoch)
    return row.end_offset is not None and at_end is not None and at_end.end_offset == row.end_offset
