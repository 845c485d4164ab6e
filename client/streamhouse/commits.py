"""Commits of processed records: computes the positions to store, stores them, and repeats that every interval.

Owns: the choice of positions, the order of commits. Does not own: how positions are stored, reading.
Invariants: one commit at a time; its positions are computed when its turn comes, so that older positions are never
stored last.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from shproto.errors import StreamHouseError, UnknownTopic

from streamhouse.core.positions import Cursor, Position
from streamhouse.records import TopicPartition

log = logging.getLogger(__name__)

Store = Callable[[Mapping[TopicPartition, Position]], Awaitable[None]]
Cursors = Mapping[TopicPartition, Cursor]
DoneBelow = Callable[[Cursor], int]


class Commits:
    """Commits for a consumer. `cursors`: cursors of the partitions being read, owned by the caller.
    `done_below(cursor)`: the offset below which the application has processed everything. `topic_gone(topic,
    topic_id)`: called for topics that a commit found deleted."""

    def __init__(
        self, cursors: Cursors, done_below: DoneBelow, store: Store, topic_gone: Callable[[str, bytes], object]
    ) -> None:
        self._cursors = cursors
        self._done_below = done_below
        self._store = store
        self._topic_gone = topic_gone
        self._turn = asyncio.Lock()
        self.stored_count = 0
        self.failed_count = 0

    async def commit(self, given: Mapping[TopicPartition, Position] | None = None) -> None:
        """Stores the positions behind processed records, or the positions `given`. Raises the error of storing:
        IllegalGeneration, UnknownMember, UnknownTopic, Unavailable."""
        async with self._turn:
            # Computed when the turn comes: positions from before the wait could be older than those just stored.
            cursors = dict(self._cursors)
            positions = _outstanding(cursors, self._done_below) if given is None else given
            await self._commit(cursors, positions, self._store)

    async def commit_existing(self, cursors: Cursors | None = None, store: Store | None = None) -> None:
        """Stores the positions behind processed records of all partitions, or of `cursors` that are not read any more,
        for topics that still exist: positions in a deleted topic are dropped, so that they do not hold up the others.
        Raises as `commit` does."""
        async with self._turn:
            cursors = dict(self._cursors if cursors is None else cursors)
            positions = _outstanding(cursors, self._done_below)
            while positions:
                try:
                    await self._commit(cursors, positions, store or self._store)
                    return
                except UnknownTopic as error:
                    rest = {where: at for where, at in positions.items() if where.topic != error.details.get("topic")}
                    # The error names no topic of these positions: dropping none of them would repeat the same commit
                    # for ever.
                    if len(rest) == len(positions):
                        raise
                    log.warning("positions of a deleted topic are not committed: %s", error)
                    positions = rest

    async def _commit(self, cursors: Cursors, positions: Mapping[TopicPartition, Position], store: Store) -> None:
        if not positions:
            return
        try:
            await store(positions)
            self.stored_count += 1
        except UnknownTopic as error:
            self.failed_count += 1
            topic = error.details.get("topic", "")
            for topic_id in {position.topic_id for where, position in positions.items() if where.topic == topic}:
                self._topic_gone(topic, topic_id)
            raise
        except StreamHouseError:
            self.failed_count += 1
            raise
        for where, position in positions.items():
            for cursor in (cursors.get(where), self._cursors.get(where)):  # a seek makes a new cursor
                if cursor is not None and cursor.topic_id == position.topic_id:
                    cursor.committed = position.offset

    async def run(self, interval_ms: int) -> None:
        """Commits every interval_ms until cancelled; failures are tried again."""
        failing = ""
        while True:
            await asyncio.sleep(interval_ms / 1000)
            try:
                await self.commit_existing()  # not `commit`: a deleted topic must not hold up the others
                failing = ""
            except StreamHouseError as error:
                if failing != error.reason:  # logged once, not with every try
                    log.warning("auto commit failed, it is tried again every %d ms: %s", interval_ms, error)
                failing = error.reason


def _outstanding(cursors: Cursors, done_below: DoneBelow) -> dict[TopicPartition, Position]:
    """Returns the positions behind processed records that are not stored yet."""
    done = {where: (cursor, done_below(cursor)) for where, cursor in cursors.items()}
    return {
        where: Position(offset, cursor.topic_id)
        for where, (cursor, offset) in done.items()
        if offset != cursor.committed  # not only above it: a seek backwards is committed as well
    }
