"""Commits of what the application has done with: what is not stored yet, storing it, and again every interval.

Owns: which positions to store, and that one commit comes after the other. Does not own: how they are stored, what is
read.
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
    """`cursors`: of what is read at the moment, the owner's. `done_below(cursor)`: the offset below which the
    application has done with everything. `topic_gone(topic, topic_id)`: told of topics that a commit found deleted.

    One commit at a time, and what it stores is looked up when it is its turn: of two that are under way, or were looked
    up one before the other, the older positions could be stored last.
    """

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
        """Stores what the application has done with, or the positions `given`. Raises what storing raises:
        IllegalGeneration, UnknownMember, UnknownTopic, Unavailable."""
        async with self._turn:
            cursors = dict(self._cursors)
            positions = _outstanding(cursors, self._done_below) if given is None else given
            await self._commit(cursors, positions, self._store)

    async def commit_existing(self, cursors: Cursors | None = None, store: Store | None = None) -> None:
        """What the application has done with, of `cursors` that it has no longer or of all, where the topic is still
        there: positions in one that is not are nobody's, and do not hold up the others. Raises as `commit` does."""
        async with self._turn:
            cursors = dict(self._cursors if cursors is None else cursors)
            positions = _outstanding(cursors, self._done_below)
            while positions:
                try:
                    await self._commit(cursors, positions, store or self._store)
                    return
                except UnknownTopic as error:
                    rest = {where: at for where, at in positions.items() if where.topic != error.details.get("topic")}
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
            for cursor in (cursors.get(where), self._cursors.get(where)):  # a seek makes a new one
                if cursor is not None and cursor.topic_id == position.topic_id:
                    cursor.committed = position.offset

    async def run(self, interval_ms: int) -> None:
        """Commits every so often until cancelled; failures are tried again."""
        failing = ""
        while True:
            await asyncio.sleep(interval_ms / 1000)
            try:
                await self.commit_existing()
                failing = ""
            except StreamHouseError as error:
                if failing != error.reason:  # told once, not with every try
                    log.warning("auto commit failed, it is tried again every %d ms: %s", interval_ms, error)
                failing = error.reason


def _outstanding(cursors: Cursors, done_below: DoneBelow) -> dict[TopicPartition, Position]:
    """What the application has done with and is not stored."""
    done = {where: (cursor, done_below(cursor)) for where, cursor in cursors.items()}
    return {
        where: Position(offset, cursor.topic_id)
        for where, (cursor, offset) in done.items()
        if offset != cursor.committed
    }
