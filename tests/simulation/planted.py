"""Defects on purpose: with each of them the simulation must find something, which shows that it can see."""

from __future__ import annotations

from contextlib import AbstractContextManager
from unittest import mock

from shproto.events import Segment
from streamhouse_coordinator.core import registration
from streamhouse_coordinator.core.registration import Result
from streamhouse_coordinator.core.tables import RangeRow
from streamhouse_ingest.adapters.wal import FileWal
from streamhouse_ingest.core import wal_index
from streamhouse_ingest.core.producers import ProducerTable
from streamhouse_query.freshness import Freshness


def _without_compare_and_set(segment: Segment, row: RangeRow | None) -> Result:
    return Result.FENCED if row is None else Result.REGISTERED


def _without_fence(segment: Segment, row: RangeRow | None) -> Result:
    """Settled ends are nothing to it."""
    if row is None or segment.base_offset < row.registered_end < segment.end_offset:
        return Result.FENCED
    if segment.end_offset <= row.registered_end:
        return Result.COVERED
    return Result.REGISTERED if segment.base_offset == row.registered_end else Result.EARLY


async def _not_asked(freshness: Freshness, topic: str) -> None:
    """The index is taken for fresh."""


PLANTED: dict[str, tuple[object, str, object]] = {
    "no-fsync": (FileWal, "_sync", lambda wal: None),
    "no-compare-and-set": (registration, "judge", _without_compare_and_set),
    "no-fence": (registration, "judge", _without_fence),
    "log-trimmed-early": (wal_index, "_covered", lambda registered_end, end_offset: True),
    "forgotten-producers": (ProducerTable, "merge", lambda table, others: None),
    "stale-index": (Freshness, "catch_up", _not_asked),
}
"""Acknowledged before it is on disk; registered whatever is there already, or beyond a settled end; files of the log
deleted before their records are registered; producers' states not taken over from where a partition was before; a
reader told that it is beyond the end by an index that is behind."""


def planted(name: str) -> AbstractContextManager[object]:
    """While it lasts the services have this defect."""
    target, attribute, defect = PLANTED[name]
    return mock.patch.object(target, attribute, defect)
