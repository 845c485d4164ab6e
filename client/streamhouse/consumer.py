"""The consumer: which partitions, from where, what the application has done with, and commits of that."""

import asyncio
import logging
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from types import MappingProxyType, TracebackType
from typing import Self

from shproto.errors import Internal, InvalidArgument, StreamHouseError, UnknownPartition, UnknownTopic
from shproto.rpc import Interceptors
from shruntime.tasks import Backoff, Tasks

from streamhouse.core.lag import Lag
from streamhouse.core.options import ConsumerOptions, OnDataLoss, OnOutOfRange, Start, partitions_of, topics_of
from streamhouse.core.positions import Cursor, Portion, Position
from streamhouse.membership import Membership
from streamhouse.metadata import MetadataCache
from streamhouse.offsets import Offsets
from streamhouse.peers import Peers
from streamhouse.reader import RETRY_FIRST_MS, RETRY_MAX_MS, Reader
from streamhouse.records import Record, RecordBatch, TopicPartition

log = logging.getLogger(__name__)

_DEFAULTS = ConsumerOptions()


class Consumer:
    """Reads records. Use it as an async context manager and iterate: records, or `batches()` of columns.

    topics: all their partitions, shared with the other members of `group` if there is one. assign: these
    (topic, partition)s instead, without membership. start: "earliest", "latest", an offset or a datetime, for
    partitions that the group has not committed. stop_at_end: an iteration ends where the log ended when it began.
    on_out_of_range, on_data_loss: whether to raise or to go on (at an end of the log; behind the loss).

    Delivery is at least once: with auto_commit only records that the application has done with (it asked for the
    next one) are committed. One consumer belongs to one event loop; see `streamhouse.sync` for plain code.
    """

    def __init__(
        self,
        bootstrap: str | Sequence[str],
        topics: Sequence[str] = (),
        *,
        assign: Sequence[tuple[str, int]] = (),
        group: str | None = _DEFAULTS.group,
        start: Start = _DEFAULTS.start,
        auto_commit: bool = _DEFAULTS.auto_commit,
        auto_commit_interval_ms: int = _DEFAULTS.auto_commit_interval_ms,
        fetch_bytes: int = _DEFAULTS.fetch_bytes,
        prefetch_bytes_max: int = _DEFAULTS.prefetch_bytes_max,
        session_timeout_ms: int = _DEFAULTS.session_timeout_ms,
        on_out_of_range: OnOutOfRange = _DEFAULTS.on_out_of_range,
        on_data_loss: OnDataLoss = _DEFAULTS.on_data_loss,
        stop_at_end: bool = _DEFAULTS.stop_at_end,
        request_timeout_ms: int = _DEFAULTS.request_timeout_ms,
        retry_timeout_ms: int = _DEFAULTS.retry_timeout_ms,
        client_id: str = _DEFAULTS.client_id,
        telemetry: Interceptors | None = None,
    ) -> None:
        self._options = ConsumerOptions(
            group=group,
            start=start,
            auto_commit=auto_commit,
            auto_commit_interval_ms=auto_commit_interval_ms,
            fetch_bytes=fetch_bytes,
            prefetch_bytes_max=prefetch_bytes_max,
            session_timeout_ms=session_timeout_ms,
            on_out_of_range=on_out_of_range,
            on_data_loss=on_data_loss,
            stop_at_end=stop_at_end,
            request_timeout_ms=request_timeout_ms,
            retry_timeout_ms=retry_timeout_ms,
            client_id=client_id,
        )
        self._topics = topics_of(topics)
        self._assign = [TopicPartition(*where) for where in partitions_of(assign)]
        if bool(self._topics) == bool(self._assign):
            raise InvalidArgument("give topics, or assign=[(topic, partition), ...], and not both", field="topics")
        self._peers = Peers(bootstrap, request_timeout_ms, telemetry)
        self._metadata = MetadataCache(self._peers.coordinator)
        self._offsets = Offsets(self._peers, self._metadata, group)
        self._reader = Reader(self._options, self._peers, self._metadata, self._offsets.look_up, self._topic_gone)
        self._membership: Membership | None = None
        self._tasks: Tasks | None = None
        self._to_open: dict[TopicPartition, object] = {}
        self._opening = asyncio.Event()
        self._portion: Portion | None = None
        self._walk: Iterator[Record] = iter(())
        self._ends_wanted = False
        self._closed = False

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close(done_with_last=False)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What was handed over last counts as done with, unless its processing is what failed.
        await self.close(done_with_last=kind is None)

    async def start(self) -> None:
        """Joins the group or opens the partitions. Iterating does it as well.

        Raises UnknownTopic, UnknownPartition, InvalidArgument, Unavailable.
        """
        if self._tasks is not None:
            return
        self._tasks = Tasks()
        partitions = await self._all_partitions()
        group_topics = self._topics if self._options.group is not None else ()
        if group_topics:
            self._membership = Membership(
                self._peers.coordinator,
                self._options,
                group_topics,
                assigned=self._on_assigned,
                revoked=self._on_revoked,
                lost=self._on_lost,
                failed=self._reader.fail,
            )
            await self._membership.join()
            self._spawn("open partitions", self._open_assigned())
            self._spawn("group membership", self._membership.run())
        else:
            await self._open(partitions)
        self._spawn("read", self._reader.run())
        if self._options.auto_commit and self._options.group is not None:
            self._spawn("auto commit", self._auto_commit())

    def _spawn(self, name: str, work: Coroutine[None, None, None]) -> None:
        """A background task; should a defect end it, iterating raises instead of waiting for ever."""
        assert self._tasks is not None
        self._tasks.spawn(name, work).add_done_callback(self._on_task_done)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._reader.fail(Internal(f"{task.get_name()} ended with {type(error).__name__}: {error}"))

    async def close(self, *, done_with_last: bool = True) -> None:
        """Commits (with auto_commit) and leaves the group, then closes the connections.

        done_with_last: whether the records handed over last are committed, too.
        """
        if self._closed:
            return
        self._closed = True
        self._reader.notify()
        try:
            if self._tasks is not None:
                await self._commit_and_leave(done_with_last)
        finally:
            if self._tasks is not None:
                await self._tasks.stop()
            await self._metadata.close()
            await self._peers.close()

    async def _commit_and_leave(self, done_with_last: bool) -> None:
        try:
            if self._options.auto_commit and self._options.group is not None:
                await _commit_existing(self._uncommitted(done_with_last), self._commit)
            if self._membership is not None:
                await self._membership.leave()
        except StreamHouseError as error:
            log.warning("closing: the group's offsets or membership are left behind: %s", error)

    # ---- reading

    def __aiter__(self) -> Self:
        self._ends_wanted = self._options.stop_at_end
        return self

    async def __anext__(self) -> Record:
        while True:
            for record in self._walk:
                return record
            if not await self._advance():
                raise StopAsyncIteration

    async def batches(self) -> AsyncIterator[RecordBatch]:
        """Records as columns, a `RecordBatch` of one partition at a time."""
        self._ends_wanted = self._options.stop_at_end
        while (batch := self._rest()) is not None or await self._advance():
            if batch is not None:
                yield batch

    def _rest(self) -> RecordBatch | None:
        """What was not handed over yet of the portion in hand, now handed over."""
        portion = self._portion
        batch = portion.rest() if portion is not None else None
        if portion is not None and batch is not None:
            portion.cursor.delivered = portion.end_offset
            self._walk = iter(())
        return batch

    async def _advance(self) -> bool:
        """Takes the next portion in hand, done with the one before; False at the end of a bounded read, or when closed.

        Raises what reading failed with: DataLoss, OffsetBelowStart, OffsetBeyondEnd, UnknownTopic, Unavailable (nothing
        answered for retry_timeout_ms). Iterating again goes on where it failed.
        """
        await self.start()
        if self._portion is not None:
            self._portion.finish()
            self._portion = None
        if self._ends_wanted:
            await self._set_ends()
            self._ends_wanted = False
        while not self._closed:
            portion = self._reader.pop()
            if portion is not None:
                self._portion = self._bounded(portion)
                self._walk = self._portion.records()
                return True
            if self._options.stop_at_end and self._all_at_end():
                break
            await self._reader.wait()
        return False

    def _bounded(self, portion: Portion) -> Portion:
        """Not beyond the end of a bounded read; what was received beyond it will be read again."""
        cursor = portion.cursor
        if cursor.end is None:
            return portion
        end = max(cursor.end, cursor.delivered)
        if portion.end_offset <= end:
            return portion
        stopped = Cursor.at(cursor.where, end, cursor.committed, end, cursor.topic_id)
        stopped.delivered, stopped.taken = cursor.delivered, cursor.taken
        self._reader.put(stopped)
        portion.cursor = stopped
        return portion.cut_at(end)

    def _all_at_end(self) -> bool:
        awaited = self._to_open or (self._membership is not None and self._membership.pending)
        return not awaited and all(cursor.at_end for cursor in self._reader.cursors.values())

    async def _set_ends(self) -> None:
        for where, end in (await self._offsets.look_up("latest", self._topic_ids())).items():
            cursor = self._reader.cursors.get(where)
            if cursor is not None and cursor.end != end:
                self._reader.put(Cursor.at(where, cursor.delivered, cursor.committed, end, cursor.topic_id))

    # ---- where we are

    @property
    def assignment(self) -> frozenset[TopicPartition]:
        """The partitions being read."""
        return frozenset(self._reader.cursors)

    @property
    def waiting(self) -> Mapping[TopicPartition, str]:
        """Why partitions that cannot be read on at the moment wait, in the server's words."""
        return MappingProxyType(self._reader.waiting)

    def positions(self) -> dict[TopicPartition, int]:
        """The next offset that will be handed over, per partition."""
        return {where: cursor.delivered for where, cursor in self._reader.cursors.items()}

    def _topic_ids(self) -> dict[TopicPartition, bytes]:
        return {where: cursor.topic_id for where, cursor in self._reader.cursors.items()}

    async def seek(self, topic: str, partition: int, offset: Start) -> None:
        """Goes on at `offset` (or at an end, or a time). Raises InvalidArgument when it is not assigned."""
        where = TopicPartition(topic, partition)
        topic_id = self._topic_ids().get(where)
        if topic_id is None:
            raise InvalidArgument(f"{topic}/{partition} is not assigned to this consumer", field="partition")
        found = offset if isinstance(offset, int) else (await self._offsets.look_up(offset, {where: topic_id}))[where]
        if found < 0:
            raise InvalidArgument(f"offset is {found}, must not be negative", field="offset", value=found)
        cursor = self._reader.cursors.get(where)
        if cursor is None:
            raise InvalidArgument(f"{topic}/{partition} was taken away meanwhile", field="partition")
        self._reader.put(Cursor.at(where, found, cursor.committed, cursor.end, cursor.topic_id))

    async def lag(self) -> dict[TopicPartition, Lag]:
        """Records still to be handed over, per partition; see `Lag` for when it is exact."""
        return await self._offsets.lag(self.positions(), self._topic_ids())

    # ---- commits

    async def commit(self, offsets: Mapping[tuple[str, int], int] | None = None) -> None:
        """Stores where the group goes on: everything handed over so far, or the `offsets` given.

        Raises InvalidArgument without a group, IllegalGeneration when a partition was taken away, Unavailable.
        """
        if self._options.group is None:
            raise InvalidArgument("a consumer without a group has nothing to commit to", field="group")
        if offsets is None:
            await self._commit(self._uncommitted(done_with_last=True))
        else:
            topic_ids = self._topic_ids()
            given = {TopicPartition(*where): offset for where, offset in offsets.items()}
            await self._commit({w: Position(offset, topic_ids.get(w, b"")) for w, offset in given.items()})

    def _uncommitted(
        self, done_with_last: bool, among: Iterable[TopicPartition] | None = None
    ) -> dict[TopicPartition, Position]:
        positions = {}
        for where in self._reader.cursors if among is None else among:
            cursor = self._reader.cursors.get(where)
            if cursor is not None:
                offset = cursor.delivered if done_with_last else cursor.taken
                if offset != cursor.committed:
                    positions[where] = Position(offset, cursor.topic_id)
        return positions

    async def _commit(self, positions: Mapping[TopicPartition, Position]) -> None:
        if not positions:
            return
        try:
            if self._membership is not None:
                await self._membership.commit_through_rebalance(positions)
            else:
                await self._offsets.commit(positions)
        except UnknownTopic as error:
            topic = error.details.get("topic", "")
            for topic_id in {position.topic_id for where, position in positions.items() if where.topic == topic}:
                self._topic_gone(topic, topic_id)
            raise
        self._note_committed(positions)

    def _note_committed(self, positions: Mapping[TopicPartition, Position]) -> None:
        for where, position in positions.items():
            cursor = self._reader.cursors.get(where)
            if cursor is not None and cursor.topic_id == position.topic_id:
                cursor.committed = position.offset

    async def _auto_commit(self) -> None:
        while True:
            await asyncio.sleep(self._options.auto_commit_interval_ms / 1000)
            try:
                await _commit_existing(self._uncommitted(done_with_last=False), self._commit)
            except StreamHouseError as error:
                log.warning("auto commit failed, it is tried again: %s", error)

    # ---- assignment

    def _on_assigned(self, added: set[TopicPartition]) -> None:
        self._to_open.update({where: object() for where in added})
        self._opening.set()
        self._reader.notify()

    async def _on_revoked(self, revoked: set[TopicPartition]) -> None:
        """Stops them, then commits what was done with; the record being processed will be read again elsewhere."""
        self._forget_opening(revoked)
        positions = self._uncommitted(done_with_last=False, among=revoked)
        for where in revoked:
            self._reader.drop(where)
        if positions and self._options.auto_commit and self._membership is not None:
            try:
                await _commit_existing(positions, self._membership.commit)
            except StreamHouseError as error:
                log.warning("the last commit of revoked partitions failed, records will be read again: %s", error)

    def _on_lost(self) -> None:
        self._to_open.clear()
        for where in list(self._reader.cursors):
            self._reader.drop(where)

    def _topic_gone(self, topic: str, topic_id: bytes) -> bool:
        """A member is assigned partitions by the topic's name, so the group may not tell it that the topic is another
        one: it starts on them anew, once there is one. Without membership that is the application's to decide."""
        if self._membership is None:
            return False
        known = self._topic_ids()
        partitions = {where for where, held in known.items() if where.topic == topic and held == topic_id}
        for where in partitions:
            self._reader.drop(where)
        self._on_assigned(partitions)
        return True

    async def _open_assigned(self) -> None:
        """Opens what the group assigns, however long finding the offsets takes; heartbeats go on meanwhile."""
        backoff = Backoff(RETRY_FIRST_MS, RETRY_MAX_MS)
        while True:
            await self._opening.wait()
            self._opening.clear()
            try:
                await self._open(sorted(self._to_open))
                backoff.reset()
            except StreamHouseError as error:
                log.warning("cannot start on %s: %s", sorted(self._to_open), error)
                if not error.retriable and not isinstance(
                    error, UnknownTopic
                ):  # it comes back, or the group takes it away
                    self._reader.fail(error)
                await asyncio.sleep(backoff.next_ms() / 1000)
                self._opening.set()

    async def _open(self, partitions: Sequence[TopicPartition]) -> None:
        """Finds where each starts, then reads it, unless it was taken away meanwhile."""
        asked = dict(self._to_open)
        topic_ids = await self._current_topic_ids(partitions)
        committed = await self._offsets.committed(topic_ids)
        fresh = {where: topic_ids[where] for where in partitions if where not in committed}
        start = self._options.start
        starts = dict.fromkeys(fresh, start) if isinstance(start, int) else await self._offsets.look_up(start, fresh)
        ends = await self._offsets.look_up("latest", topic_ids) if self._options.stop_at_end else {}
        # Taken away and given back meanwhile counts as taken away: another member may have gone further.
        still = {where for where, token in asked.items() if self._to_open.get(where) is token}
        for where in partitions:
            if self._membership is None or where in still:
                offset = committed.get(where, starts.get(where, 0))
                cursor = Cursor.at(where, offset, committed.get(where, -1), ends.get(where), topic_ids[where])
                self._reader.put(cursor)
        self._forget_opening(still)
        self._reader.notify()

    async def _current_topic_ids(self, partitions: Collection[TopicPartition]) -> dict[TopicPartition, bytes]:
        """As the coordinator knows them now: a query service may still have a deleted topic of the same name."""
        for topic in {where.topic for where in partitions}:
            await self._metadata.refresh(topic)
        return {where: (await self._metadata.topic(where.topic)).topic_id for where in partitions}

    def _forget_opening(self, partitions: Iterable[TopicPartition]) -> None:
        for where in partitions:
            self._to_open.pop(where, None)

    async def _all_partitions(self) -> list[TopicPartition]:
        for topic, partition in self._assign:
            count = (await self._metadata.topic(topic)).partitions
            if not 0 <= partition < count:
                raise UnknownPartition(f"topic {topic!r} has partitions 0 to {count - 1}, not {partition}", topic=topic)
        states = [await self._metadata.topic(topic) for topic in self._topics]
        return self._assign or [
            TopicPartition(state.topic, number) for state in states for number in range(state.partitions)
        ]


async def _commit_existing(
    positions: Mapping[TopicPartition, Position], commit: Callable[[Mapping[TopicPartition, Position]], Awaitable[None]]
) -> None:
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
