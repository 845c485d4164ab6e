"""The consumer as applications see it: its life, its membership of a group, positions; the work is done elsewhere.

Owns: the parts of a consumer and their background tasks. Does not own: what is received, what is handed over, commits.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from functools import partial
from types import MappingProxyType, TracebackType
from typing import Any, Literal, Self

from opentelemetry import trace
from shproto import forks
from shproto.errors import (
    Internal,
    InvalidArgument,
    PollIntervalExceeded,
    StreamHouseError,
    UnknownMember,
    UnknownPartition,
)
from shproto.rpc import Interceptors
from shruntime.tasks import Backoff, Tasks

from streamhouse.commits import Commits
from streamhouse.core.in_flight import Worker
from streamhouse.core.kafka_names import explains_kafka_names
from streamhouse.core.lag import Lag
from streamhouse.core.options import (
    POLL_BATCHES_RECORDS_MAX,
    POLL_RECORDS_MAX,
    ConsumerOptions,
    Deserializer,
    OnDataLoss,
    OnOutOfRange,
    Place,
    Start,
    addresses_of,
    check_poll,
    check_timeout_ms,
    check_timestamp,
    committed_position,
    partitions_of,
    seek_place,
    topics_of,
)
from streamhouse.core.positions import Cursor, Position
from streamhouse.core.serializers import Deserializers, records_of_poll
from streamhouse.iteration import Iteration
from streamhouse.membership import Membership
from streamhouse.metadata import MetadataCache
from streamhouse.metrics import ConsumerMetrics
from streamhouse.offsets import Offsets
from streamhouse.openings import Openings
from streamhouse.peers import Peers
from streamhouse.reader import Reader
from streamhouse.records import (
    MembershipState,
    OffsetAndMetadata,
    Record,
    RecordBatch,
    TopicPartition,
)
from streamhouse.retries import RETRY_FIRST_MS, RETRY_MS_MAX, Retries
from streamhouse.tracing import ReceiveTracing

log = logging.getLogger(__name__)

# The application is looked at so often within max_poll_interval_ms: that much later at most its silence is noticed.
POLL_CHECKS = 10

_DEFAULTS = ConsumerOptions()


class Consumer:
    """Reads records. Use it as an async context manager and iterate: records, or `batches()` of columns.

    topics: all their partitions, shared with the other members of `group` if there is one. assign: these
    (topic, partition)s instead, without membership. start: "earliest", "latest", an offset, -N (the last N records of
    each partition) or a datetime, for partitions that the group has not committed. end: the first offset, or time, that
    is not read; iterations end there. stop_at_end: an iteration ends where the log ended when it began.
    on_out_of_range, on_data_loss: whether to raise or to go on (at an end of the log; behind the loss).
    key_deserializer, value_deserializer: called with the bytes of every key and value that is not None; not in batches.

    Several tasks may iterate one consumer: each record goes to one of them. Delivery is at least once: with auto_commit
    only records that the application has done with are committed, and a task has done with a record when it asks for
    its next one. One consumer belongs to one event loop; see `streamhouse.sync` for plain code.
    """

    @explains_kafka_names("Consumer")
    def __init__(
        self,
        bootstrap: str | Sequence[str],
        topics: Sequence[str] = (),
        *,
        assign: Sequence[tuple[str, int]] = (),
        group: str | None = _DEFAULTS.group,
        start: Start = _DEFAULTS.start,
        end: int | datetime | None = _DEFAULTS.end,
        auto_commit: bool = _DEFAULTS.auto_commit,
        auto_commit_interval_ms: int = _DEFAULTS.auto_commit_interval_ms,
        fetch_bytes: int = _DEFAULTS.fetch_bytes,
        prefetch_bytes_max: int = _DEFAULTS.prefetch_bytes_max,
        session_timeout_ms: int = _DEFAULTS.session_timeout_ms,
        max_poll_interval_ms: int = _DEFAULTS.max_poll_interval_ms,
        on_out_of_range: OnOutOfRange = _DEFAULTS.on_out_of_range,
        on_data_loss: OnDataLoss = _DEFAULTS.on_data_loss,
        stop_at_end: bool = _DEFAULTS.stop_at_end,
        request_timeout_ms: int = _DEFAULTS.request_timeout_ms,
        retry_timeout_ms: int = _DEFAULTS.retry_timeout_ms,
        client_id: str = _DEFAULTS.client_id,
        key_deserializer: Deserializer | None = None,
        value_deserializer: Deserializer | None = None,
        telemetry: Interceptors | None = None,
    ) -> None:
        self._options = ConsumerOptions(
            group=group,
            start=start,
            end=end,
            auto_commit=auto_commit,
            auto_commit_interval_ms=auto_commit_interval_ms,
            fetch_bytes=fetch_bytes,
            prefetch_bytes_max=prefetch_bytes_max,
            session_timeout_ms=session_timeout_ms,
            max_poll_interval_ms=max_poll_interval_ms,
            on_out_of_range=on_out_of_range,
            on_data_loss=on_data_loss,
            stop_at_end=stop_at_end,
            request_timeout_ms=request_timeout_ms,
            retry_timeout_ms=retry_timeout_ms,
            client_id=client_id,
            key_deserializer=key_deserializer,
            value_deserializer=value_deserializer,
        )
        self._deserializers = Deserializers.of(self._options)
        self._tracing = ReceiveTracing(group, client_id)
        self._topics = topics_of(topics)
        self._assign = [TopicPartition(*where) for where in partitions_of(assign)]
        if bool(self._topics) == bool(self._assign):
            raise InvalidArgument("give topics, or assign=[(topic, partition), ...], and not both", field="topics")
        addresses = addresses_of(bootstrap)
        self._peers = Peers(addresses, request_timeout_ms, telemetry)
        self._retries = Retries("retry_timeout_ms", retry_timeout_ms, addresses)
        self._metadata = MetadataCache(self._peers)
        self._offsets = Offsets(self._peers, self._metadata, group)
        self._reader = Reader(self._options, self._peers, self._metadata, self._offsets.look_up, self._topic_gone)
        self._membership: Membership | None = None
        self._tasks: Tasks | None = None  # once started
        self._starting = asyncio.Lock()
        self._starts = 0  # number of calls that wait for the partitions to be open
        self._openings = Openings(self._options, self._metadata, self._offsets, self._reader, self._store_starts)
        self._iteration = Iteration(
            self._reader,
            self._offsets,
            stop_at_end,
            self._is_opening,
            self._advance,
            received=self._tracing.received,
            is_bounded=end is not None,
        )
        self._next = self._iteration.next if self._deserializers is None else self._next_deserialized
        self._in_flight = self._iteration.in_flight
        self._commits = Commits(self._reader.cursors, self._done_below, self._store, self._topic_gone)
        # Why the next read fails: the application was silent for too long, and the consumer has left its group.
        self._silence: PollIntervalExceeded | None = None
        # True from when the group forgot what was done with and not committed, until it has taken the member back.
        self._has_lost = False
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
        """Joins the group or opens the partitions: returns once it is known where reading begins in each of them.
        Iterating does it as well.

        Raises UnknownTopic, UnknownPartition, InvalidArgument, Unavailable, RuntimeError in a forked child.
        """
        forks.check()
        async with self._starting:
            if self._tasks is not None or self._closed:
                return
            await self._retries.run(self._find_partitions)
            if not self._closed:
                self._run()
        self._starts += 1
        try:
            await self._openings.opened()
        finally:
            self._starts -= 1

    async def _find_partitions(self) -> None:
        """What may fail or be cancelled of a start: another one begins here again."""
        partitions = await self._all_partitions()
        if self._options.group is None or not self._topics:
            await self._openings.open(partitions)
            return
        # Kept, should joining fail: the member id is its own, and no ghost stays behind when it tries again.
        self._membership = self._membership or Membership(
            self._peers.coordinator,
            self._options,
            self._topics,
            assigned=self._on_assigned,
            revoked=self._on_revoked,
            lost=self._on_lost,
            failed=self._reader.fail,
        )
        await self._membership.join()

    def _run(self) -> None:
        self._tasks = Tasks()
        self._iteration.start()
        if self._membership is not None:
            self._spawn("open partitions", self._openings.run())
            self._spawn("group membership", self._membership.run())
            self._spawn("poll interval", self._watch_polls())
        self._spawn("read", self._reader.run())
        if self._options.auto_commit and self._options.group is not None:
            self._spawn("auto commit", self._commits.run(self._options.auto_commit_interval_ms))

    def _spawn(self, name: str, work: Coroutine[None, None, None]) -> None:
        """A background task; should a defect end it, iterating raises instead of waiting for ever."""
        assert self._tasks is not None
        self._tasks.spawn(name, work).add_done_callback(self._on_task_done)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._reader.fail(Internal(f"{task.get_name()} ended with {type(error).__name__}: {error}"))

    async def close(self, *, done_with_last: bool = True) -> None:
        """Commits (with auto_commit) and leaves the group, then closes the connections.

        done_with_last: whether the record in hand of the task that calls is committed, too, and those of tasks that
        have returned. Raises what the last commit failed with; if not done_with_last, that is only logged, for an error
        is on its way already.
        """
        await self._close(self._worker(), done_with_last)

    async def _close(self, worker: Worker, done_with_last: bool) -> None:
        if self._closed:
            return
        self._closed = True
        self._iteration.close()
        refusal: StreamHouseError | None = None
        try:
            if self._tasks is not None:
                if done_with_last:
                    worker.held = None
                    self._in_flight.finish_ended()
                refusal = await self._commit_and_leave()
        finally:
            if self._tasks is not None:
                await self._tasks.stop()
            await self._metadata.close()
            await self._peers.close()
        if refusal is not None:
            if done_with_last:
                raise refusal
            log.warning("closing: the last commit failed, records will be read again: %s", refusal)

    async def _commit_and_leave(self) -> StreamHouseError | None:
        """Returns what the commit failed with. That leaving failed is no matter: the group finds out by itself."""
        refusal: StreamHouseError | None = self._silence
        if self._options.auto_commit and self._options.group is not None:
            refusal = await self._last_commit() or refusal
            if refusal is None and self._has_lost:
                refusal = UnknownMember(
                    f"group {self._options.group} has forgotten this consumer and not taken it back since: what it had "
                    "done with and not committed will be read again",
                    group=self._options.group,
                )
        if self._membership is not None:
            try:
                await self._membership.leave()
            except StreamHouseError as error:
                log.warning("closing: group %s was not told, it will notice: %s", self._options.group, error)
        return refusal

    async def _last_commit(self) -> StreamHouseError | None:
        """Commits; again for as long as a call may take, if it may pass: there is no later one to make up for it."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + self._options.request_timeout_ms / 1000
        backoff = Backoff(RETRY_FIRST_MS, RETRY_MS_MAX)
        while True:
            try:
                await self._commits.commit_existing()
                return None
            except StreamHouseError as error:
                if not error.retriable or loop.time() >= deadline_s:
                    return error
                await asyncio.sleep(max(error.retry_after_ms, backoff.next_ms()) / 1000)

    # ---- reading

    def __aiter__(self) -> "RecordIterator":
        self._iteration.begin()
        return RecordIterator(self, self._worker())

    def __anext__(self) -> Coroutine[Any, Any, Record]:
        worker = self._worker()
        worker.held = None
        return self._next(worker)

    def batches(self) -> "BatchIterator":
        """Records as columns, a `RecordBatch` of one partition at a time."""
        self._iteration.begin()
        return BatchIterator(self)

    def poll(
        self, timeout_ms: int = 0, max_records: int = POLL_RECORDS_MAX
    ) -> Coroutine[Any, Any, dict[TopicPartition, list[Record]]]:
        """Returns records by partition: what has been received, at most max_records; empty if nothing comes within
        timeout_ms, or at the end of a bounded read (`at_end`). What the last poll of the task returned is done with.

        Raises as iterating does; InvalidArgument once the consumer is closed.
        """
        return self._poll_records(self._polls(timeout_ms, max_records), timeout_ms, max_records)

    def poll_batches(
        self, timeout_ms: int = 0, max_records: int = POLL_BATCHES_RECORDS_MAX
    ) -> Coroutine[Any, Any, dict[TopicPartition, list[RecordBatch]]]:
        """As `poll`, but returns the records as columns: of each partition a list of `RecordBatch`."""
        return self._poll(self._polls(timeout_ms, max_records), timeout_ms, max_records)

    def _polls(self, timeout_ms: int, max_records: int) -> Worker:
        """Returns the task that polls. It has done with what it had in hand, unless its arguments are wrong."""
        check_poll(timeout_ms, max_records)
        worker = self._worker()
        worker.held = None
        return worker

    async def _poll_records(
        self, worker: Worker, timeout_ms: int, max_records: int
    ) -> dict[TopicPartition, list[Record]]:
        polled = await self._poll(worker, timeout_ms, max_records)
        return records_of_poll(self._deserializers, polled, partial(self._iteration.give_back, worker))

    async def _poll(self, worker: Worker, timeout_ms: int, max_records: int) -> dict[TopicPartition, list[RecordBatch]]:
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_ms / 1000
        polled: dict[TopicPartition, list[RecordBatch]] = {}
        while not polled and await self._advance_within(worker, deadline_s):
            left = max_records
            while left and self._iteration.bring():
                batch = self._iteration.take_batch(worker, left)
                if batch is not None:
                    polled.setdefault(TopicPartition(batch.topic, batch.partition), []).append(batch)
                    left -= len(batch)
        return polled

    async def _advance_within(self, worker: Worker, deadline_s: float) -> bool:
        """As `_advance`; False as well if there is nothing to take by the deadline, of the event loop's clock. The
        first call starts the consumer, however long that takes: a short timeout would end each try."""
        self._refuse_closed()
        if self._tasks is None:
            await self.start()
        try:
            async with asyncio.timeout_at(deadline_s):
                return await self._advance(worker)
        except TimeoutError:
            return self._iteration.bring()

    def processing(self, records: Record | RecordBatch) -> AbstractContextManager[trace.Span]:
        """Context manager of a `process` span, which is current inside: what the application does for a record, or for
        a batch, is part of a trace that leads back to where it was sent. Costs next to nothing without an OpenTelemetry
        SDK. Exceptions are recorded and raised on."""
        return self._tracing.processing(records)

    @property
    def at_end(self) -> bool:
        """True once a bounded read (`end`, `stop_at_end`) has handed over everything up to its end."""
        return self._tasks is not None and self._iteration.at_end

    def _worker(self) -> Worker:
        """The task that calls. Found when it calls, not when what it awaits runs: `wait_for` runs that in another."""
        try:
            return self._in_flight.worker(asyncio.current_task())
        except RuntimeError:  # no event loop runs yet
            return self._in_flight.worker(None)

    async def _next_deserialized(self, worker: Worker) -> Record:
        """Returns the next record with its key and value as objects. Raises SerializationError with the record in the
        worker's hand, as if it had been handed over: it is not committed, and the next call goes on behind it."""
        assert self._deserializers is not None, "this is called for them"
        return self._deserializers.record(await self._iteration.next(worker))

    async def _next_batch(self, worker: Worker) -> RecordBatch:
        while (batch := self._iteration.take_batch(worker)) is None:
            if not await self._advance(worker):
                raise StopAsyncIteration
        return batch

    async def _enter(self) -> None:
        """Starts the consumer, and joins again if the application was silent; that is raised first, once."""
        await self.start()
        if self._silence is not None:
            silence, self._silence = self._silence, None
            raise silence
        if self._membership is not None:
            self._membership.come_back()

    def _refuse_closed(self) -> None:
        if self._closed:
            raise InvalidArgument("the consumer is closed", field="consumer")

    async def _advance(self, worker: Worker) -> bool:
        await self._enter()
        found = await self._iteration.advance()
        self._in_flight.waited(worker)
        return found

    def _is_opening(self) -> bool:
        member = self._membership
        # One that the group has forgotten has no partitions, and will have: no end of what there is to read.
        return self._openings.pending or (member is not None and (member.pending or not member.member_id))

    async def _watch_polls(self) -> None:
        """Leaves the group if the application asks for nothing for max_poll_interval_ms: it hangs, and the heartbeats
        of a task that does not would keep its partitions from the others for ever."""
        seen, silent = self._iteration.progress(), 0
        while True:
            await asyncio.sleep(self._options.max_poll_interval_ms / 1000 / POLL_CHECKS)
            now = self._iteration.progress()
            # Looks are counted, not time: while the whole process stands still the application cannot ask either.
            silent = silent + 1 if now == seen and self._is_member() and not self._starts else 0
            if silent == POLL_CHECKS:
                await self._step_out(seen)
                now, silent = self._iteration.progress(), 0
            seen = now

    def _is_member(self) -> bool:
        return self._membership is not None and bool(self._membership.member_id)

    async def _step_out(self, seen: object) -> None:
        """`seen`: the application's progress at the last look; nothing is wrong if it has gone on since."""
        group, limit_ms = self._options.group, self._options.max_poll_interval_ms
        if self._options.auto_commit:
            try:
                await self._commits.commit_existing()
            except StreamHouseError as error:
                log.warning(
                    "the last commit before leaving group %s failed, records will be read again: %s", group, error
                )
        if self._iteration.progress() != seen or self._membership is None:
            return
        self._silence = PollIntervalExceeded(
            f"the application has asked for no record for {limit_ms} ms (max_poll_interval_ms): the consumer has left "
            f"group {group}, and its partitions go to other members; iterating again joins anew",
            group=group,
            max_poll_interval_ms=limit_ms,
        )
        log.warning("%s", self._silence)
        try:
            await self._membership.step_out()
        except StreamHouseError as error:
            log.warning("leaving: group %s was not told, it will notice: %s", group, error)

    # ---- where we are

    @property
    def assignment(self) -> frozenset[TopicPartition]:
        """The partitions being read."""
        return frozenset(self._reader.cursors)

    async def wait_for_assignment(self, timeout_ms: int | None = None) -> frozenset[TopicPartition]:
        """Returns the assignment as soon as it is known where reading begins in at least one partition; starts the
        consumer. A group with more members than partitions leaves some without.

        Raises TimeoutError after timeout_ms (None: never), InvalidArgument once the consumer is closed, else as
        iterating does.
        """
        if timeout_ms is not None:
            check_timeout_ms(timeout_ms)
        try:
            async with asyncio.timeout(None if timeout_ms is None else timeout_ms / 1000):
                await self._wait_for_assignment()
        except TimeoutError:
            raise TimeoutError(f"no partition was assigned within timeout_ms = {timeout_ms}") from None
        return self.assignment

    async def _wait_for_assignment(self) -> None:
        await self._enter()
        self._starts += 1  # a wait of the application: it does not hang
        try:
            while not self._reader.cursors and not self._closed:
                self._reader.pop()  # without partitions only a failure can be there; it is raised
                await self._reader.wait()
        finally:
            self._starts -= 1
        self._refuse_closed()

    @property
    def membership(self) -> MembershipState | None:
        """How the consumer stands in its group; None without one, and for partitions given by `assign`."""
        if self._options.group is None or not self._topics:
            return None
        member = self._membership
        if member is None or member.is_out:
            return MembershipState(self._options.group, "", 0, "out")
        if not member.member_id:
            return MembershipState(self._options.group, "", 0, "joining")
        state: Literal["rebalancing", "stable"] = "rebalancing" if self._is_opening() else "stable"
        return MembershipState(self._options.group, member.member_id, member.generation, state)

    @property
    def waiting(self) -> Mapping[TopicPartition, str]:
        """Why partitions that cannot be read on at the moment wait, in the server's words."""
        return MappingProxyType(self._reader.waiting)

    def positions(self) -> dict[TopicPartition, int]:
        """The next offset that will be handed over, per partition."""
        # Copied in one step: `streamhouse.sync` asks from another thread.
        return {where: cursor.delivered for where, cursor in list(self._reader.cursors.items())}

    async def seek(self, topic: str, partition: int, offset: Start) -> None:
        """Goes on at `offset` (or at an end, or a time). Raises InvalidArgument when it is not assigned."""
        place = seek_place(offset)
        cursor = self._assigned_cursor(TopicPartition(topic, partition))
        if isinstance(place, int):
            self._move(cursor, place)
        else:
            await self._move_to(place, [cursor], are_named=True)

    async def seek_to_beginning(self, partitions: Sequence[tuple[str, int]] | None = None) -> None:
        """Goes on at the first record that is still there, in these partitions or all that are assigned. Raises as
        `seek` does; then nothing has moved."""
        await self._seek_to("earliest", partitions)

    async def seek_to_end(self, partitions: Sequence[tuple[str, int]] | None = None) -> None:
        """Goes on behind the last acknowledged record, in these partitions or all that are assigned. Raises as `seek`
        does; then nothing has moved."""
        await self._seek_to("latest", partitions)

    async def seek_to_timestamp(
        self, timestamp_ms: int | datetime, partitions: Sequence[tuple[str, int]] | None = None
    ) -> None:
        """Goes on at the first record, in the order of offsets, that is as late as `timestamp_ms` (since 1970, or a
        datetime with a time zone), in these partitions or all that are assigned; at the end of those without any.
        Raises as `seek` does; then nothing has moved."""
        check_timestamp(timestamp_ms)
        await self._seek_to(timestamp_ms, partitions)

    async def _seek_to(self, at: Place, partitions: Sequence[tuple[str, int]] | None) -> None:
        await self.start()
        asked = list(self._reader.cursors.values()) if partitions is None else self._assigned_cursors(partitions)
        await self._move_to(at, asked, are_named=partitions is not None)

    async def _move_to(self, at: Place, asked: Sequence[Cursor], *, are_named: bool) -> None:
        """Moves the partitions to where `at` is in each. Those taken away meanwhile are left out, or if the application
        has named them raise InvalidArgument, and then nothing has moved."""
        topic_ids = {cursor.where: cursor.topic_id for cursor in asked}
        found = await self._retries.run(lambda: self._offsets.look_up(at, topic_ids))
        still = {where: cursor for where in found if (cursor := self._reader.cursors.get(where)) is not None}
        gone = [where for where in found if where not in still or still[where].topic_id != topic_ids[where]]
        if gone and are_named:
            raise InvalidArgument(f"{gone[0].topic}/{gone[0].partition} was taken away meanwhile", field="partition")
        for where in found.keys() - gone:
            self._move(still[where], found[where])

    def _move(self, cursor: Cursor, offset: int) -> None:
        moved = Cursor.at(cursor.where, offset, cursor.committed, cursor.end, cursor.topic_id)
        moved.bound = cursor.bound
        self._reader.put(moved)

    def pause(self, partitions: Sequence[tuple[str, int]]) -> None:
        """Hands over no records of these partitions, and fetches none, until `resume`. They stay assigned, and members
        of the group notice nothing. Raises InvalidArgument when one is not assigned; then none is paused."""
        for cursor in self._assigned_cursors(partitions):
            self._reader.pause(cursor)

    def resume(self, partitions: Sequence[tuple[str, int]]) -> None:
        """Goes on with paused partitions where they were, or where a `seek` has put them meanwhile. Raises
        InvalidArgument when one is not assigned; then none is resumed."""
        for cursor in self._assigned_cursors(partitions):
            self._reader.resume(cursor)

    def paused(self) -> frozenset[TopicPartition]:
        """Returns the assigned partitions that are paused."""
        return frozenset(where for where, cursor in list(self._reader.cursors.items()) if cursor.paused)

    def _assigned_cursors(self, partitions: Sequence[tuple[str, int]]) -> list[Cursor]:
        return [self._assigned_cursor(TopicPartition(*where)) for where in partitions_of(partitions, "partitions")]

    def _assigned_cursor(self, where: TopicPartition) -> Cursor:
        cursor = self._reader.cursors.get(where)
        if cursor is None:
            raise InvalidArgument(
                f"{where.topic}/{where.partition} is not assigned to this consumer", field="partition"
            )
        return cursor

    async def lag(self) -> dict[TopicPartition, Lag]:
        """Records still to be handed over, per partition; see `Lag` for when it is exact."""
        return await self._retries.run(lambda: self._offsets.lag(self.positions(), self._reader.topic_ids()))

    def metrics(self) -> ConsumerMetrics:
        """Returns counters since the consumer was made and gauges of this moment; asks no server, as `lag` does."""
        records_read, bytes_read = self._iteration.read()
        cursors = list(self._reader.cursors.items())  # in one step: `streamhouse.sync` asks from another thread
        return ConsumerMetrics(
            records_read=records_read,
            bytes_read=bytes_read,
            commits=self._commits.stored_count,
            commits_failed=self._commits.failed_count,
            rebalances=0 if self._membership is None else self._membership.rebalance_count,
            prefetch_used_bytes=self._reader.received_bytes,
            prefetch_bytes_max=self._options.prefetch_bytes_max,
            lag={
                where: max(0, cursor.high_watermark - cursor.delivered)
                for where, cursor in cursors
                if cursor.high_watermark >= 0
            },
        )

    # ---- commits

    async def committed(
        self, partitions: Sequence[tuple[str, int]] | None = None
    ) -> dict[TopicPartition, OffsetAndMetadata | None]:
        """Returns what the group has committed in these partitions, assigned or not, or in all that are assigned; None
        where nothing is.

        Raises InvalidArgument without a group, UnknownTopic, UnknownPartition, Unavailable.
        """
        if self._options.group is None:
            raise InvalidArgument("a consumer without a group has committed nothing", field="group")
        if partitions is None:
            await self.start()
            asked = list(self._reader.cursors)
        else:
            asked = [TopicPartition(*where) for where in partitions_of(partitions, "partitions")]
        return await self._retries.run(lambda: self._committed(asked))

    async def _committed(self, asked: Sequence[TopicPartition]) -> dict[TopicPartition, OffsetAndMetadata | None]:
        await self._check_partitions(asked)
        known = self._reader.topic_ids()
        topic_ids = {where: known.get(where) or (await self._metadata.topic(where.topic)).topic_id for where in asked}
        found = await self._offsets.committed(topic_ids)
        return {where: found.get(where) for where in asked}

    async def commit(self, offsets: Mapping[tuple[str, int], int | OffsetAndMetadata] | None = None) -> None:
        """Stores where the group goes on: behind everything that the application has done with, the record in hand of
        the task that calls included; or the `offsets` given, with metadata if they are `OffsetAndMetadata`.

        Raises InvalidArgument without a group, IllegalGeneration when a partition was taken away, Unavailable.
        """
        await self._commit(self._worker(), offsets)

    async def _commit(self, worker: Worker, offsets: Mapping[tuple[str, int], int | OffsetAndMetadata] | None) -> None:
        if self._options.group is None:
            raise InvalidArgument("a consumer without a group has nothing to commit to", field="group")
        if offsets is None:
            worker.held = None
            await self._commits.commit()
        else:
            given = {TopicPartition(*where): committed_position(at) for where, at in offsets.items()}
            await self._commits.commit(
                {where: Position(offset, self._topic_id(where), note) for where, (offset, note) in given.items()}
            )

    def _topic_id(self, where: TopicPartition) -> bytes:
        """Of the topic that the application has read by this name, if only other partitions of it; else empty."""
        known = self._reader.topic_ids()
        of_topic = (topic_id for read, topic_id in known.items() if read.topic == where.topic)
        return known.get(where) or next(of_topic, b"")

    def _done_below(self, cursor: Cursor) -> int:
        for worker, held, offset in () if self._closed else self._in_flight.abandoned():
            log.warning(
                "%r has ended with %s/%d, offset %d, in hand, without asking for another record: the group's position "
                "stays there",
                worker.owner,
                *held.where,
                offset,
            )
        return self._in_flight.done_below(cursor)

    async def _store_starts(self, positions: Mapping[TopicPartition, Position]) -> None:
        if self._membership is not None:
            await self._membership.commit(positions)
        else:
            await self._offsets.commit(positions)

    async def _store(self, positions: Mapping[TopicPartition, Position]) -> None:
        if self._membership is not None:
            await self._membership.commit_through_rebalance(positions)
        else:
            await self._offsets.commit(positions)

    # ---- assignment

    def _on_assigned(self, partitions: set[TopicPartition]) -> None:
        self._has_lost = False
        self._openings.add(partitions)

    async def _on_revoked(self, revoked: set[TopicPartition]) -> None:
        """Stops them, then commits what was done with; the record being processed will be read again elsewhere."""
        self._openings.forget(revoked)
        cursors = {where: cursor for where, cursor in self._reader.cursors.items() if where in revoked}
        for where in revoked:
            self._reader.drop(where)
        if self._options.auto_commit and self._membership is not None:
            try:
                await self._commits.commit_existing(cursors, self._membership.commit)
            except StreamHouseError as error:
                log.warning("the last commit of revoked partitions failed, records will be read again: %s", error)

    def _on_lost(self) -> None:
        cursors = self._reader.cursors.values()
        self._has_lost = any(self._in_flight.done_below(cursor) > max(cursor.committed, 0) for cursor in cursors)
        self._openings.forget_all()
        for where in list(self._reader.cursors):
            self._reader.drop(where)

    def _topic_gone(self, topic: str, topic_id: bytes) -> bool:
        """A member is assigned partitions by the topic's name, so the group may not tell it that the topic is another
        one: it starts on them anew, once there is one. Without membership that is the application's to decide."""
        if self._membership is None:
            return False
        known = self._reader.topic_ids()
        partitions = {where for where, held in known.items() if where.topic == topic and held == topic_id}
        for where in partitions:
            self._reader.drop(where)
        self._openings.add(partitions)
        return True

    async def _check_partitions(self, partitions: Sequence[TopicPartition]) -> None:
        for topic, partition in partitions:
            count = (await self._metadata.topic(topic)).partitions
            if not 0 <= partition < count:
                raise UnknownPartition(f"topic {topic!r} has partitions 0 to {count - 1}, not {partition}", topic=topic)

    async def _all_partitions(self) -> list[TopicPartition]:
        await self._check_partitions(self._assign)
        states = [await self._metadata.topic(topic) for topic in self._topics]
        return self._assign or [
            TopicPartition(state.topic, number) for state in states for number in range(state.partitions)
        ]


class RecordIterator(AsyncIterator[Record]):
    """Iterator of records for the task that began the `async for`."""

    __slots__ = ("_consumer", "_worker")

    def __init__(self, consumer: Consumer, worker: Worker) -> None:
        self._consumer = consumer
        self._worker = worker

    def __anext__(self) -> Coroutine[Any, Any, Record]:
        self._worker.held = None
        return self._consumer._next(self._worker)


class BatchIterator(AsyncIterator[RecordBatch]):
    """Iterator of `Consumer.batches`. A timeout or a cancellation ends one wait, not the iteration."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer
        self._closed = False

    def __anext__(self) -> Coroutine[Any, Any, RecordBatch]:
        worker = self._consumer._worker()
        worker.held = None
        return self._consumer._next_batch(worker) if not self._closed else _ended()

    async def aclose(self) -> None:
        """Nothing more comes; for `contextlib.aclosing`."""
        self._closed = True


async def _ended() -> RecordBatch:
    raise StopAsyncIteration
