"""Commits of what the application has done with: what is not stored yet, storing it, and again every interval.

Owns: which positions to store. Does not own: how they are stored, what is read.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping

from shproto.errors import StreamHouseError, UnknownTopic

from streamhouse.core.positions import Cursor, Position
from streamhouse.records import TopicPartition

log = logging.getLogger(__name__)

Store = Callable[[Mapping[TopicPartition, Position]], Awaitable[None]]


class Commits:
    """`cursors`: of what is read at the moment, the owner's. `topic_gone(topic, topic_id)`: told of topics that a
    commit found deleted."""

    def __init__(
        self, cursors: Mapping[TopicPartition, Cursor], store: Store, topic_gone: Callable[[str, bytes], object]
    ) -> None:
        self._cursors = cursors
        self._store = store
        self._topic_gone = topic_gone
        self._turn = asyncio.Lock()

    def outstanding(
        self, done_with_last: bool, among: Iterable[TopicPartition] | None = None
    ) -> dict[TopicPartition, Position]:
        """Positions to store, of all partitions or `among` these. done_with_last: whether the record in hand counts."""
        positions = {}
        for where in self._cursors if among is None else among:
            cursor = self._cursors.get(where)
            if cursor is not None:
                offset = cursor.delivered if done_with_last else cursor.taken
                if offset != cursor.committed:
                    positions[where] = Position(offset, cursor.topic_id)
        return positions

    async def commit(self, positions: Mapping[TopicPartition, Position]) -> None:
        """Raises what storing raises: IllegalGeneration, UnknownMember, UnknownTopic, Unavailable."""
        if not positions:
            return
        try:
            await self.in_turn(self._store, positions)
        except UnknownTopic as error:
            topic = error.details.get("topic", "")
            for topic_id in {position.topic_id for where, position in positions.items() if where.topic == topic}:
                self._topic_gone(topic, topic_id)
            raise
        self._note_committed(positions)

    async def in_turn(self, store: Store, positions: Mapping[TopicPartition, Position]) -> None:
        """One commit at a time, in the order asked for: of two that are under way, the older positions may be stored
        last. Raises what `store` raises."""
        async with self._turn:
            await store(positions)

    def _note_committed(self, positions: Mapping[TopicPartition, Position]) -> None:
        for where, position in positions.items():
            cursor = self._cursors.get(where)
            if cursor is not None and cursor.topic_id == position.topic_id:
                cursor.committed = position.offset

    async def run(self, interval_ms: int) -> None:
        """Commits every so often until cancelled; failures are tried again."""
        while True:
            await asyncio.sleep(interval_ms / 1000)
            try:
                await commit_existing(self.outstanding(done_with_last=False), self.commit)
            except StreamHouseError as error:
                log.warning("auto commit failed, it is tried again: %s", error)


async def commit_existing(positions: Mapping[TopicPartition, Position], commit: Store) -> None:
    """Positions in a topic that is not there any more are nobody's, and do not hold up the others."""
    while positions:
        try:
            await commit(positions)
            return
        except UnknownTopic as error:
            rest = {where: at for where, at in positions.items() if where.topic != error.details.get("topic")}
            if len(rest) == len(positions):
                raise
            log.warning("positions of a deleted topic are not committed: %s", error)
            positions = rest
