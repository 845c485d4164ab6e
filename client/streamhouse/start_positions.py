"""Finds the start position of assigned partitions and then gives them to the reader.

Owns: the partitions that are assigned and not opened yet. Does not own: the assignment, the reader's cursors.
Invariants: a start position found before a revocation is not used, even if the group has assigned the partition again
meanwhile.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

from shproto.errors import IllegalGeneration, StreamHouseError, UnknownMember, UnknownTopic
from shproto.limits import RETRY_FIRST_MS, RETRY_MS_MAX
from shruntime.tasks import Backoff

from streamhouse.core.options import ConsumerOptions, LastRecords
from streamhouse.core.positions import Cursor, Position
from streamhouse.offsets import Offsets
from streamhouse.reader import Reader
from streamhouse.records import TopicPartition
from streamhouse.retries import retries_exhausted

log = logging.getLogger(__name__)


# Errors that pass by themselves: the topic comes back, or the group revokes the partition.
_PASSING = (UnknownTopic, IllegalGeneration, UnknownMember)


class StartPositions:
    """Opens partitions: `add` and `forget` with `run` as a task of the owner, or `open` at once. `store(positions)`:
    commits the positions at which a group begins. `is_held()`: True if the reader has to hold opened partitions until
    they are released. `opened(partitions)`: called with added partitions that the reader has now. `topic_unknown()`:
    called when a topic is gone."""

    def __init__(
        self,
        options: ConsumerOptions,
        offsets: Offsets,
        reader: Reader,
        store: Callable[[Mapping[TopicPartition, Position]], Awaitable[None]],
        *,
        is_held: Callable[[], bool],
        opened: Callable[[set[TopicPartition]], None],
        topic_unknown: Callable[[], None],
    ) -> None:
        self._options = options
        self._offsets = offsets
        self._reader = reader
        self._store = store
        self._is_held = is_held
        self._opened = opened
        self._topic_unknown = topic_unknown
        self._awaited: dict[TopicPartition, object] = {}  # with a new token for each assignment
        self._added = asyncio.Event()
        self._progress = asyncio.Event()  # something was opened, taken away, or failed
        self._failure: StreamHouseError | None = None

    @property
    def pending(self) -> bool:
        """True if any partition is still to be opened."""
        return bool(self._awaited)

    def add(self, partitions: Iterable[TopicPartition]) -> None:
        """Has `run` open these partitions."""
        self._awaited.update({where: object() for where in partitions})
        self._added.set()
        self._reader.notify()

    def forget(self, partitions: Iterable[TopicPartition]) -> None:
        """Drops partitions that are not opened yet."""
        for where in partitions:
            self._awaited.pop(where, None)
        self._progress.set()

    async def opened(self) -> None:
        """Returns once all added partitions are open. Raises the error of opening: at once if the error is permanent,
        else after retry_timeout_ms (Unavailable if nothing had failed until then). `run` keeps trying in any case."""
        self._failure = None  # an error from before this call concerns an earlier try
        try:
            async with asyncio.timeout(self._options.retry_timeout_ms / 1000):
                while self._awaited:
                    self._progress.clear()
                    await self._progress.wait()
                    error = self._failure
                    if self._awaited and error is not None and not error.retriable and not isinstance(error, _PASSING):
                        raise error
        except TimeoutError:
            what = f"cannot start on {_names(self._awaited)}"
            limit_ms = self._options.retry_timeout_ms
            raise retries_exhausted(what, "retry_timeout_ms", limit_ms, self._failure) from self._failure

    async def run(self) -> None:
        """Opens added partitions, without a limit of time for finding their offsets, until cancelled."""
        backoff = Backoff(RETRY_FIRST_MS, RETRY_MS_MAX)
        failing = ""
        while True:
            await self._added.wait()
            self._added.clear()
            try:
                await self._open_awaited()
                backoff.reset()
                failing = ""
            except StreamHouseError as error:
                if failing != error.reason and self._awaited:  # logged once, not with every try
                    log.warning("cannot start on %s, trying again: %s", _names(self._awaited), error)
                failing = error.reason
                if not error.retriable and not isinstance(error, _PASSING):
                    self._reader.fail(error)
                if isinstance(error, UnknownTopic):
                    self._topic_unknown()
                self._failure = error
                self._progress.set()
                await asyncio.sleep(backoff.next_ms() / 1000)
                self._added.set()

    async def _open_awaited(self) -> None:
        # A copy with the tokens of now: partitions are revoked, and assigned again, during the requests below.
        asked = dict(self._awaited)
        cursors = await self._find(sorted(asked))
        await self._store_starts(
            [cursor for cursor in cursors if self._awaited.get(cursor.where) is asked[cursor.where]]
        )
        # A partition revoked and assigned again meanwhile counts as revoked: another member may have read further.
        still = {where for where, token in asked.items() if self._awaited.get(where) is token}
        self._put(cursor for cursor in cursors if cursor.where in still)
        self.forget(still)
        self._opened(still)
        self._reader.notify()

    async def open(self, partitions: Sequence[TopicPartition]) -> None:
        """Reads these partitions from now on. Raises UnknownTopic, Unavailable."""
        cursors = await self._find(partitions)
        await self._store_starts(cursors)
        self._put(cursors)

    def _put(self, cursors: Iterable[Cursor]) -> None:
        for cursor in cursors:
            cursor.held = self._is_held()
            self._reader.put(cursor)

    async def _store_starts(self, cursors: Sequence[Cursor]) -> None:
        """Commits the start positions of a group that are counted from the end of the log ("latest", -N). After a
        restart, or for the next owner of the partition, the same start would be further on, and the records between
        would never be read."""
        start = self._options.start
        if self._options.group is None or not (start == "latest" or (isinstance(start, int) and start < 0)):
            return
        fresh = [cursor for cursor in cursors if cursor.committed < 0]
        if fresh:
            await self._store({cursor.where: Position(cursor.fetch_offset, cursor.topic_id) for cursor in fresh})
        for cursor in fresh:
            cursor.committed = cursor.fetch_offset

    async def _find(self, partitions: Sequence[TopicPartition]) -> list[Cursor]:
        """Returns a cursor of each partition at its start position, with the end of a bounded read. Raises
        UnknownTopic, Unavailable."""
        topic_ids = await self._offsets.current_topic_ids(partitions)
        found = await self._offsets.committed(topic_ids)
        committed = {where: at.offset for where, at in found.items()}
        fresh = {where: topic_ids[where] for where in partitions if where not in committed}
        start = self._options.start
        if isinstance(start, int) and start >= 0:
            starts = dict.fromkeys(fresh, start)
        else:
            place = LastRecords(-start) if isinstance(start, int) else start
            starts = await self._offsets.look_up(place, fresh)
        # After the starts: an end looked up before could lie below a start that was counted from the end.
        ends = await self._offsets.look_up("latest", topic_ids) if self._options.stop_at_end else {}
        bounds = await self._bounds(topic_ids)
        cursors = [
            Cursor.at(
                where, committed.get(where, starts.get(where, 0)), committed.get(where, -1), None, topic_ids[where]
            )
            for where in partitions
        ]
        for cursor in cursors:
            cursor.bound = bounds.get(cursor.where)
            cursor.end = cursor.end_at(ends.get(cursor.where))
        return cursors

    async def _bounds(self, topic_ids: Mapping[TopicPartition, bytes]) -> dict[TopicPartition, int]:
        """Returns the offsets at which the option `end` ends reading."""
        end = self._options.end
        if end is None:
            return {}
        return dict.fromkeys(topic_ids, end) if isinstance(end, int) else await self._offsets.look_up(end, topic_ids)


def _names(partitions: Iterable[TopicPartition]) -> str:
    return ", ".join(f"{topic}/{partition}" for topic, partition in sorted(partitions))
