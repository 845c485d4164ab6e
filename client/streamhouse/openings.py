"""Partitions on their way to being read: each is given to the reader once it is known where to start.

Owns: which are assigned and not read yet. Does not own: who assigns them, the reader's cursors.
"""

import asyncio
import logging
from collections.abc import Collection, Iterable, Sequence

from shproto.errors import StreamHouseError, UnknownTopic
from shruntime.tasks import Backoff

from streamhouse.core.options import ConsumerOptions
from streamhouse.core.positions import Cursor
from streamhouse.metadata import MetadataCache
from streamhouse.offsets import Offsets
from streamhouse.reader import RETRY_FIRST_MS, RETRY_MAX_MS, Reader
from streamhouse.records import TopicPartition

log = logging.getLogger(__name__)


class Openings:
    """`add` and `forget` what a group gives and takes, with `run` as a task of the owner; or `open` what is never
    taken away."""

    def __init__(self, options: ConsumerOptions, metadata: MetadataCache, offsets: Offsets, reader: Reader) -> None:
        self._options = options
        self._metadata = metadata
        self._offsets = offsets
        self._reader = reader
        self._awaited: dict[TopicPartition, object] = {}
        self._news = asyncio.Event()

    @property
    def pending(self) -> bool:
        """Whether any partition is still to be opened."""
        return bool(self._awaited)

    def add(self, partitions: Iterable[TopicPartition]) -> None:
        """To be opened, by `run`."""
        self._awaited.update({where: object() for where in partitions})
        self._news.set()
        self._reader.notify()

    def forget(self, partitions: Iterable[TopicPartition]) -> None:
        """Taken away before they were opened."""
        for where in partitions:
            self._awaited.pop(where, None)

    def forget_all(self) -> None:
        """As `forget`, of whatever is awaited."""
        self._awaited.clear()

    async def run(self) -> None:
        """Opens what was added, however long finding the offsets takes; until cancelled."""
        backoff = Backoff(RETRY_FIRST_MS, RETRY_MAX_MS)
        while True:
            await self._news.wait()
            self._news.clear()
            try:
                await self._open_awaited()
                backoff.reset()
            except StreamHouseError as error:
                log.warning("cannot start on %s: %s", sorted(self._awaited), error)
                # A topic that is not there comes back, or the group takes it away.
                if not error.retriable and not isinstance(error, UnknownTopic):
                    self._reader.fail(error)
                await asyncio.sleep(backoff.next_ms() / 1000)
                self._news.set()

    async def _open_awaited(self) -> None:
        asked = dict(self._awaited)
        cursors = await self._find(sorted(asked))
        # Taken away and given back meanwhile counts as taken away: another member may have gone further.
        still = {where for where, token in asked.items() if self._awaited.get(where) is token}
        for cursor in cursors:
            if cursor.where in still:
                self._reader.put(cursor)
        self.forget(still)
        self._reader.notify()

    async def open(self, partitions: Sequence[TopicPartition]) -> None:
        """Reads these from now on. Raises UnknownTopic, Unavailable."""
        for cursor in await self._find(partitions):
            self._reader.put(cursor)

    async def _find(self, partitions: Sequence[TopicPartition]) -> list[Cursor]:
        """Where each starts, and where a bounded read of it ends."""
        topic_ids = await self._current_topic_ids(partitions)
        committed = await self._offsets.committed(topic_ids)
        fresh = {where: topic_ids[where] for where in partitions if where not in committed}
        start = self._options.start
        starts = dict.fromkeys(fresh, start) if isinstance(start, int) else await self._offsets.look_up(start, fresh)
        ends = await self._offsets.look_up("latest", topic_ids) if self._options.stop_at_end else {}
        return [
            Cursor.at(
                where,
                committed.get(where, starts.get(where, 0)),
                committed.get(where, -1),
                ends.get(where),
                topic_ids[where],
            )
            for where in partitions
        ]

    async def _current_topic_ids(self, partitions: Collection[TopicPartition]) -> dict[TopicPartition, bytes]:
        """As the coordinator knows them now: a query service may still have a deleted topic of the same name."""
        for topic in {where.topic for where in partitions}:
            await self._metadata.refresh(topic)
        return {where: (await self._metadata.topic(where.topic)).topic_id for where in partitions}
