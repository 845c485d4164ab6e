"""Defects on purpose: with each of them the simulation must find something, which shows that it can see."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from unittest import mock

from shcluster.index_catch_up import IndexCatchUp
from shformat import ProducerStamp
from shproto.model import Segment
from streamhouse import commits
from streamhouse.core.partition_queue import PartitionQueue
from streamhouse.core.positions import Cursor, Position
from streamhouse.core.producer_batch import ProducerBatch
from streamhouse.records import TopicPartition
from streamhouse_coordinator.core import groups, registration
from streamhouse_coordinator.core.groups import Group
from streamhouse_coordinator.core.registration import Result
from streamhouse_coordinator.core.tables import RangeRow
from streamhouse_ingest.adapters.wal import FileWal
from streamhouse_ingest.leadership import fencing
from streamhouse_ingest.log import wal_index
from streamhouse_ingest.log.fences import Fence, check_fenced
from streamhouse_ingest.log.producers import ProducerState, ProducerTable, Verdict
from streamhouse_ingest.produce import draft


def _without_compare_and_set(segment: Segment, row: RangeRow | None) -> Result:
    return Result.FENCED if row is None else Result.REGISTERED


def _without_fence(segment: Segment, row: RangeRow | None) -> Result:
    """Settled ends are nothing to it."""
    if row is None or segment.base_offset < row.registered_end < segment.end_offset:
        return Result.FENCED
    if segment.end_offset <= row.registered_end:
        return Result.COVERED
    return Result.REGISTERED if segment.base_offset == row.registered_end else Result.EARLY


async def _not_asked(catch_up: IndexCatchUp, topic: str) -> None:
    """The index is taken for fresh."""


def _without_generation(group: Group, member: str, generation: int, names: Iterable[str]) -> None:
    """Whoever says that it is a member commits what it likes."""


def _without_hand_over(group: Group, member: str) -> tuple[frozenset[str], bool]:
    """The new owner does not wait for the old one."""
    return group.target.get(member, frozenset()), False


_take = PartitionQueue.take


def _renumbered(queue: PartitionQueue, now_ms: float) -> ProducerBatch:
    """A batch that is sent again gets the next sequence number."""
    queue._queued[0].stamp = None
    return _take(queue, now_ms)


def _received(cursors: Mapping[TopicPartition, Cursor], done_below: object) -> dict[TopicPartition, Position]:
    """What was fetched is committed, whether the application has it or not."""
    return {where: Position(cursor.fetch_offset, cursor.topic_id) for where, cursor in cursors.items()}


def _without_epochs(fence: Fence | None, state: ProducerState | None, stamp: ProducerStamp, count: int) -> Verdict:
    """Whatever continues the stream is taken, of a zombie as well."""
    if fence is not None:
        stamp = stamp._replace(producer_epoch=fence.producer_epoch)
    return check_fenced(fence, state, stamp, count)


PLANTED: dict[str, tuple[object, str, object]] = {
    "no-fsync": (FileWal, "_sync", lambda wal: None),
    "no-compare-and-set": (registration, "judge", _without_compare_and_set),
    "no-fence": (registration, "judge", _without_fence),
    "log-trimmed-early": (wal_index, "_covered", lambda registered_end, end_offset: True),
    "forgotten-producers": (ProducerTable, "merge", lambda table, others: None),
    "stale-index": (IndexCatchUp, "catch_up", _not_asked),
    "commits-not-fenced": (groups, "check_commit", _without_generation),
    "no-hand-over": (groups, "available", _without_hand_over),
    "retry-renumbered": (PartitionQueue, "take", _renumbered),
    "received-is-committed": (commits, "_outstanding", _received),
    "zombies-write": (draft, "check_fenced", _without_epochs),
    "older-ranges-forgotten": (fencing, "latest", lambda states: None),
}
"""Acknowledged before it is on disk; registered whatever is there already, or beyond a settled end; files of the log
deleted before their records are registered; producers' states not taken over from where a partition was before; a
reader told that it is beyond the end by an index that is behind; a group's offsets taken from members whose time is
over; partitions given to a new member while the old one reads on; a producer's retry under a new sequence number; a
consumer that commits what its application has not had; batches of an older producer epoch taken behind a fence; a fence
that answers the last sequence of the leader's own range alone."""

PLANTED_PROFILES = {
    "stale-index": "roaming-readers",
    "commits-not-fenced": "late-commits",
    "no-hand-over": "late-commits",
    "zombies-write": "numbered-streams",
    "older-ranges-forgotten": "numbered-streams",
}
"""For defects that an ordinary run hardly ever shows: the profile in which their situation is frequent."""


def planted(name: str) -> AbstractContextManager[object]:
    """While it lasts the services have this defect."""
    target, attribute, defect = PLANTED[name]
    return mock.patch.object(target, attribute, defect)
