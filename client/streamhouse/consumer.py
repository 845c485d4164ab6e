"""The consumer as applications see it: its life, its membership of a group, its positions.

Owns: the parts of a consumer and their background tasks. Does not own: receiving (reader), handing over (iteration),
commits, callbacks.
Invariants: background tasks run from the first start until `close`; if a defect ends a background task, reading fails.
Once `close` has begun no record is handed over. The task that calls the consumer calls the callbacks, never a
background task.
"""

import asyncio
import logging
from collections import ChainMap
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self, Unpack

from opentelemetry import trace
from shcluster.peers import Peers
from shproto import forks
from shproto.errors import (
    IllegalGeneration,
    Internal,
    InvalidArgument,
    PollIntervalExceeded,
    StreamHouseError,
    Unavailable,
    UnknownMember,
    UnknownPartition,
)
from shproto.limits import RETRY_FIRST_MS, RETRY_MS_MAX
from shproto.rpc import Interceptors
from shruntime.tasks import Backoff, Tasks
from shruntime.urls import addresses_of

from streamhouse.assignments import Assignments, Callback, Callbacks, callbacks_of
from streamhouse.commits import Commits
from streamhouse.core.in_flight import Worker
from streamhouse.core.kafka_names import explains_kafka_arguments, explains_kafka_methods, explains_kafka_names
from streamhouse.core.lag import Lag
from streamhouse.core.options import (
    POLL_BATCHES_RECORDS_MAX,
    POLL_RECORDS_MAX,
    ConsumerKwargs,
    ConsumerOptions,
    Place,
    Start,
    check_poll,
    check_timeout_ms,
    check_timeout_s,
    check_timestamp,
    committed_positions,
    partitions_of,
    seek_place,
    shows_options,
)
from streamhouse.core.positions import Cursor, Position
from streamhouse.core.serializers import Deserializers, records_of_poll
from streamhouse.core.subscription import Subscription, Topics, subscription_of
from streamhouse.core.sync_mismatch import AsyncContext, AsyncIteration
from streamhouse.iteration import Iteration
from streamhouse.membership import Membership
from streamhouse.metadata import MetadataCache
from streamhouse.metrics import ConsumerMetrics
from streamhouse.offsets import Offsets
from streamhouse.reader import Reader
from streamhouse.records import (
    MembershipState,
    OffsetAndMetadata,
    Record,
    RecordBatch,
    TopicPartition,
)
from streamhouse.retries import Retries
from streamhouse.start_positions import StartPositions
from streamhouse.subscriptions import Subscriptions
from streamhouse.tracing import ReceiveTracing

log = logging.getLogger(__name__)

# Checks of the application's progress within max_poll_interval_ms: its silence is noticed at most a tenth of the
# interval late.
POLL_CHECKS = 10


@dataclass(slots=True, kw_only=True)
class Closing:
    """A `close` under way. deadline_s: on the event loop's clock; None: no limit. errors: for the application."""

    done_with_last: bool
    timeout_s: float | None
    deadline_s: float | None
    errors: list[Exception] = field(default_factory=list)
    is_late: bool = False

    def late(self) -> None:
        """Marks the close as late and adds a TimeoutError to the errors."""
        self.is_late = True
        self.errors.append(
            TimeoutError(
                f"the consumer was not closed within timeout_s = {self.timeout_s}: what was done with and not "
                "committed will be read again, and its group notices by itself that it is gone"
            )
        )


@explains_kafka_methods("Consumer")
class Consumer(AsyncContext, AsyncIteration):
    """Reads records. An async context manager; iterate over the consumer for records, over `batches()` for columns.

    topics: names, or a compiled pattern that has to match the whole name of a topic. All partitions are read; members
    of `group` share them. pattern: a pattern as text, instead of topics. `subscribe` sets topics later.
    assign: (topic, partition) pairs to read instead, without membership of a group. on_assigned, on_revoked, on_lost:
    see `subscribe`.
    start: first position in partitions where the group has committed nothing: "earliest", "latest", an offset, -N (the
    last N records of each partition) or a datetime. end: offset or time of the first record that is not read;
    iterations end there. stop_at_end: an iteration ends where the log ended when the iteration began.
    on_out_of_range: "error", or the end of the log at which reading goes on. on_data_loss: "error", or "skip" to go on
    behind the lost records.
    key_deserializer, value_deserializer: called with the bytes of every key and value that is not None, but not for
    batches.

    Several tasks may iterate over one consumer: each record goes to a single task. Delivery is at least once: with
    auto_commit only processed records are committed, and a task has processed a record (is done with it) when the task
    asks for its next record. A consumer belongs to one event loop; `streamhouse.sync` is for plain code.
    """

    @explains_kafka_names("Consumer")
    @shows_options(ConsumerOptions)
    def __init__(
        self,
        bootstrap: str | Sequence[str],
        topics: Topics = (),
        *,
        pattern: str | None = None,
        assign: Sequence[tuple[str, int]] = (),
        on_assigned: Callback | None = None,
        on_revoked: Callback | None = None,
        on_lost: Callback | None = None,
        telemetry: Interceptors | None = None,
        **options: Unpack[ConsumerKwargs],
    ) -> None:
        self._options = ConsumerOptions(**options)
        self._deserializers = Deserializers.of(self._options)
        self._tracing = ReceiveTracing(self._options.group, self._options.client_id)
        subscription = subscription_of(topics, pattern)
        callbacks = callbacks_of(Callbacks(on_assigned, on_revoked, on_lost))
        self._assign = [TopicPartition(*where) for where in partitions_of(assign)]
        if subscription and self._assign:
            raise InvalidArgument("give topics, or assign=[(topic, partition), ...], and not both", field="topics")
        if callbacks != Callbacks() and self._assign:
            raise InvalidArgument(
                "no group assigns or revokes the partitions of assign: there is nothing to call on_assigned, "
                "on_revoked and on_lost for",
                field="assign",
            )
        addresses = addresses_of(bootstrap)
        self._peers = Peers(addresses, self._options.request_timeout_ms, telemetry)
        self._retries = Retries("retry_timeout_ms", self._options.retry_timeout_ms, addresses)
        self._metadata = MetadataCache(self._peers)
        self._offsets = Offsets(self._peers, self._metadata, self._options.group)
        self._reader = Reader(self._options, self._peers, self._metadata, self._offsets.look_up, self._topic_gone)
        self._membership: Membership | None = None
        self._tasks: Tasks | None = None  # once started
        self._starting = asyncio.Lock()  # every task that iterates starts the consumer
        self._starts = 0  # number of calls that wait for the partitions to be open
        self._start_positions = StartPositions(
            self._options,
            self._offsets,
            self._reader,
            self._store_starts,
            # Lambdas, because assignments and subscriptions are made below, from this part.
            is_held=lambda: self._assignments.announces,
            opened=lambda partitions: self._assignments.opened(partitions),
            topic_unknown=lambda: self._subscriptions.refresh_soon(),
        )
        self._assignments = Assignments(
            self._reader, self._start_positions, callbacks, revoked=self._commit_revoked, changed=self._on_owned_changed
        )
        self._subscriptions = Subscriptions(
            self._peers, self._metadata, self._options.topic_refresh_interval_ms, self._on_topics_found
        )
        self._subscriptions.replace(subscription)
        self._iteration = Iteration(
            self._reader,
            self._offsets,
            self._options,
            self._is_opening,
            self._advance,
            received=self._tracing.received,
            is_interrupted=lambda: self._assignments.is_due,
        )
        self._next = self._iteration.next if self._deserializers is None else self._next_deserialized
        self._in_flight = self._iteration.in_flight
        cursors = ChainMap(self._reader.cursors, self._assignments.kept)
        self._commits = Commits(cursors, self._done_below, self._store, self._topic_gone)
        # Error that the next read raises: the application was silent for too long, and the consumer has left its group.
        self._silence: PollIntervalExceeded | None = None
        self._progress_seen: object = None  # at the last check of the application's progress
        self._silent_checks = 0
        # True from the moment when the group forgets this member, and with it processed records that are not committed,
        # until the member has joined again.
        self._has_lost = False
        self._closed = False

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close(done_with_last=False)  # a failed start leaves connections, and perhaps tasks
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The records handed over last count as processed, unless the block failed: they may be the cause.
        await self.close(done_with_last=kind is None)

    async def start(self) -> None:
        """Joins the group, or opens the partitions. Returns once the position at which reading begins is known for each
        of them and on_assigned has returned. Iterating starts the consumer as well. Idempotent.

        Raises UnknownTopic, UnknownPartition, InvalidArgument, Unavailable, RuntimeError in a forked child.
        """
        self._assignments.refuse_inside("start")
        await self._start()
        await self._assignments.call_due()

    async def _start(self) -> None:
        """Starts the consumer, without callbacks. Raises as `start`."""
        forks.check()
        async with self._starting:
            if self._tasks is not None or self._closed:
                return
            self._refuse_unsubscribed()
            await self._retries.run(self._find_partitions)
            if not self._closed:
                self._run()
        await self._opened()

    async def _opened(self) -> None:
        self._starts += 1
        try:
            await self._start_positions.opened()
        finally:
            self._starts -= 1

    def _refuse_unsubscribed(self) -> None:
        if not self._assign and not self._subscriptions.current:
            raise InvalidArgument(
                "the consumer reads nothing: give topics, a pattern or assign=[(topic, partition), ...], or call "
                "subscribe",
                field="topics",
            )

    async def _find_partitions(self) -> None:
        """Does the part of a start that may fail or be cancelled; the next start begins here again."""
        if self._assign:
            await self._check_partitions(self._assign)
            await self._start_positions.open(self._assign)
            return
        subscription = self._subscriptions.current
        topics = await self._subscriptions.find(subscription)
        if self._options.group is not None:
            # Kept if joining fails: the next try then uses the same member id, and no ghost member stays behind in the
            # group.
            self._membership = self._membership or self._member()
            self._membership.read_topics(topics)
            await self._membership.join()
        elif subscription.pattern is None:
            # Opened here, not in the background: the errors of topics that the application names are the start's.
            await self._start_positions.open(_partitions_of(topics))
            self._assignments.adopt(_partitions_of(topics))
        else:
            self._assignments.assign(_partitions_of(topics))

    def _member(self) -> Membership:
        return Membership(
            self._peers.coordinator,
            self._options,
            (),
            given=self._on_given,
            lost=self._on_lost,
            owned=lambda: self._assignments.owned,
            failed=self._reader.fail,
        )

    def _run(self) -> None:
        self._tasks = Tasks()
        self._iteration.start()
        if not self._assign:
            self._spawn("open partitions", self._start_positions.run())
            self._spawn("hand-over", self._assignments.run())
            self._spawn("find topics", self._subscriptions.run())
        if self._membership is not None:
            self._spawn("group membership", self._membership.run())
            self._spawn("poll interval", self._watch_polls())
        self._spawn("read", self._reader.run())
        if self._options.auto_commit and self._options.group is not None:
            self._spawn("auto commit", self._commits.run(self._options.auto_commit_interval_ms))

    def _spawn(self, name: str, work: Coroutine[None, None, None]) -> None:
        """Starts a background task. If a defect ends the task, iterating raises instead of waiting for ever."""
        assert self._tasks is not None
        self._tasks.spawn(name, work).add_done_callback(self._on_task_done)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._reader.fail(Internal(f"{task.get_name()} ended with {type(error).__name__}: {error}"))

    # ---- subscription

    @explains_kafka_arguments("Consumer.subscribe")
    async def subscribe(
        self,
        topics: Topics = (),
        *,
        pattern: str | None = None,
        on_assigned: Callback | None = None,
        on_revoked: Callback | None = None,
        on_lost: Callback | None = None,
    ) -> None:
        """Reads these topics instead of the earlier ones: names, or a pattern that has to match the whole name, also of
        topics created later. On a started consumer the partitions of other topics are revoked and the records in hand
        of the calling task count as processed; returns once the position at which reading begins is known for the
        partitions that the group has assigned so far.

        on_assigned(partitions): called before records of these partitions are handed over. on_revoked(partitions):
        called before these partitions go to other members; the callback may still commit. on_lost(partitions): called
        when another member may own these partitions already (without on_lost, on_revoked is called). Callbacks are
        plain functions or coroutine functions, called in the task that asks for records, starts, subscribes or closes;
        None leaves a callback as it is.

        Raises InvalidArgument, UnknownTopic (then nothing has changed), Unavailable, and the error of a callback.
        """
        await self._subscribe(
            self._worker(), subscription_of(topics, pattern), callbacks_of(Callbacks(on_assigned, on_revoked, on_lost))
        )
        await self._finish_revocation()
        await self._await_subscription()
        await self._assignments.call_due()

    async def _subscribe(self, worker: Worker, subscription: Subscription, callbacks: Callbacks) -> None:
        """Subscribes. The caller calls `_finish_revocation` after that, then `_await_subscription`."""
        self._refuse_subscribing("subscribe")
        if not subscription:
            raise InvalidArgument("there are no topics in it; unsubscribe stops reading", field="topics")
        topics: Mapping[str, int] | None = None
        async with self._starting:  # a start under way finds the earlier topics
            is_started = self._tasks is not None
        if is_started:
            topics = await self._retries.run(lambda: self._subscriptions.find(subscription))
            self._refuse_closed()
        self._assignments.replace_callbacks(self._assignments.callbacks.updated(callbacks))
        self._subscriptions.replace(subscription)
        if topics is None:
            return
        worker.held = None
        self._on_topics_found(topics)
        if self._membership is not None:
            # Among the partitions assigned now; further partitions come with the answer to the join.
            self._assignments.keep(lambda where: subscription.includes(where.topic))
            # A silent consumer has left: its next read raises PollIntervalExceeded, the read after that joins again.
            if self._silence is None:
                self._membership.come_back()

    def _refuse_subscribing(self, what: str) -> None:
        self._assignments.refuse_inside(what)
        self._refuse_closed()
        if self._assign:
            raise InvalidArgument(f"a consumer of the partitions of assign has nothing to {what}", field="assign")

    async def _finish_revocation(self) -> None:
        """Returns once the callbacks for all revoked and lost partitions have returned."""
        while not await self._assignments.wait_revoked():
            await self._assignments.call_due()

    async def _await_subscription(self) -> None:
        """Returns once the group knows the topics and the assigned partitions are open."""
        if self._tasks is None:
            return
        limit_ms = self._options.retry_timeout_ms
        self._starts += 1  # the application waits, so it does not hang
        try:
            if self._membership is not None:
                async with asyncio.timeout(limit_ms / 1000):
                    await self._membership.joined()
        except TimeoutError:
            raise Unavailable(
                f"group {self._options.group} has not taken the new topics for retry_timeout_ms = {limit_ms}; it is "
                "asked again"
            ) from None
        finally:
            self._starts -= 1
        self._refuse_closed()
        await self._opened()

    async def unsubscribe(self) -> None:
        """Reads nothing until the next `subscribe`: revokes all partitions, with on_revoked, and leaves the group. The
        records in hand of the calling task count as processed and are committed with auto_commit.

        Raises the error of that commit or of a callback; the consumer is unsubscribed all the same.
        """
        refusal = await self._unsubscribe(self._worker())
        try:
            await self._finish_revocation()
        finally:
            await self._step_out_of_group()
        if refusal is not None:
            raise refusal

    async def _unsubscribe(self, worker: Worker) -> StreamHouseError | None:
        """Stops reading; returns the error of the last commit, or None. `_finish_revocation` and `_step_out_of_group`
        follow."""
        self._refuse_subscribing("unsubscribe")
        async with self._starting:  # a start under way has the earlier topics
            is_started = self._tasks is not None
        self._subscriptions.replace(Subscription())
        if not is_started:
            return None
        worker.held = None
        try:
            return await self._last_commit() if self._commits_by_itself else None
        finally:
            self._assignments.stop_reading()

    async def _step_out_of_group(self) -> None:
        """Leaves the group, after the partitions are revoked."""
        self._silence = None
        if self._membership is not None:
            try:
                await self._membership.step_out()
            except StreamHouseError as error:
                log.warning(
                    "unsubscribed: leaving group %s failed, the membership ends with its session: %s",
                    self._options.group,
                    error,
                )

    @property
    def _commits_by_itself(self) -> bool:
        return self._options.auto_commit and self._options.group is not None

    # ---- the end

    @explains_kafka_arguments("Consumer.close")
    async def close(self, timeout_s: float | None = None, *, done_with_last: bool = True) -> None:
        """Commits (with auto_commit), revokes the partitions, with on_revoked, leaves the group, then closes the
        connections.

        done_with_last: True commits the record in hand of the calling task, and those of tasks that have returned, as
        processed. Raises TimeoutError if closing takes longer than timeout_s (None: only the options' limits apply),
        the error of a callback, or the error of the last commit; everything is closed all the same. With
        done_with_last=False these errors are only logged, because another error is already on its way.
        """
        closing = await self._begin_close(self._worker(), timeout_s, done_with_last=done_with_last)
        if closing is None:
            return
        try:
            if not closing.is_late:
                try:
                    async with asyncio.timeout_at(closing.deadline_s) as limit:
                        await self._call_last(closing)
                except TimeoutError:
                    if not limit.expired():
                        raise
                    closing.late()
        except BaseException:
            await self._shut_down()
            raise
        await self._end_close(closing)

    async def _begin_close(self, worker: Worker, timeout_s: float | None, *, done_with_last: bool) -> Closing | None:
        """Stops handing over, and commits for the last time. Returns None if the consumer is already closed; else
        `_end_close` follows, after the callbacks that are due."""
        check_timeout_s("timeout_s", timeout_s)
        self._assignments.refuse_inside("close")
        if self._closed:
            return None
        self._closed = True
        # Before the first await: a task that reads meanwhile gets no further record.
        self._iteration.close()
        deadline_s = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
        closing = Closing(done_with_last=done_with_last, timeout_s=timeout_s, deadline_s=deadline_s)
        if self._tasks is None:
            return closing
        if done_with_last:
            worker.held = None
            self._in_flight.finish_ended()
        try:
            async with asyncio.timeout_at(deadline_s) as limit:
                closing.errors += await self._refusals()
            # Only for the callbacks: without them, leaving the group gives the partitions up.
            if self._assignments.callbacks.kinds():
                self._assignments.stop_reading()
        except TimeoutError:
            if not limit.expired():
                await self._shut_down()
                raise
            closing.late()
        except BaseException:
            await self._shut_down()
            raise
        return closing

    async def _call_last(self, closing: Closing) -> None:
        """Calls the on_revoked and on_lost that are due, and waits for callbacks that other tasks call."""
        while self._assignments.is_busy:
            try:
                await self._assignments.call_due()
            except Exception as error:  # noqa: BLE001 - raised once everything is closed
                closing.errors.insert(0, error)
            await self._assignments.idle()

    async def _end_close(self, closing: Closing) -> None:
        """Leaves the group and closes the connections. Raises the first of the errors."""
        try:
            if self._tasks is not None and self._membership is not None and not closing.is_late:
                try:
                    async with asyncio.timeout_at(closing.deadline_s):
                        await self._membership.leave()
                # The group notices by the session timeout.
                except StreamHouseError as error:
                    log.warning(
                        "closing: leaving group %s failed, the membership ends with its session: %s",
                        self._options.group,
                        error,
                    )
                except TimeoutError:
                    closing.late()
        finally:
            await self._shut_down()
        if closing.errors and closing.done_with_last:
            raise closing.errors[0]
        for unraised in closing.errors:
            if isinstance(unraised, StreamHouseError):
                log.warning("closing: the last commit failed, records will be read again: %s", unraised)
            else:
                log.warning("closing: a callback failed: %r", unraised)

    async def _close_quietly(self) -> None:
        """Closes without callbacks, when the process ends: no thread of the application is left to call them."""
        closing = await self._begin_close(self._worker(), None, done_with_last=False)
        if closing is not None:
            await self._end_close(closing)

    async def _shut_down(self) -> None:
        # In this order: callbacks and tasks use the connections until they have ended.
        await self._assignments.stop()
        if self._tasks is not None:
            await self._tasks.stop()
        await self._metadata.close()
        await self._peers.close()

    async def _refusals(self) -> list[StreamHouseError]:
        """Commits for the last time. Returns a list with the error of that commit, else the earlier error, else
        nothing."""
        refusal: StreamHouseError | None = self._silence
        if self._commits_by_itself:
            refusal = await self._last_commit() or refusal
            if refusal is None and self._has_lost:
                refusal = UnknownMember(
                    f"group {self._options.group} has forgotten this consumer and not taken it back since: what it had "
                    "done with and not committed will be read again",
                    group=self._options.group,
                )
        return [] if refusal is None else [refusal]

    async def _last_commit(self) -> StreamHouseError | None:
        """Commits, and retries for request_timeout_ms while the error is retriable: no later commit makes up for this
        last one. Returns the remaining error, or None."""
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
        """Returns an async iterator of records as columns: each `RecordBatch` has records of one partition."""
        self._iteration.begin()
        return BatchIterator(self)

    @explains_kafka_arguments("Consumer.poll")
    def poll(
        self, timeout_ms: int = 0, max_records: int = POLL_RECORDS_MAX
    ) -> Coroutine[Any, Any, dict[TopicPartition, list[Record]]]:
        """Returns received records by partition, at most max_records; empty if none arrive within timeout_ms, or at the
        end of a bounded read (`at_end`). The records of the task's previous poll count as processed.

        Raises as iterating does; InvalidArgument once the consumer is closed.
        """
        return self._poll_records(self._polls(timeout_ms, max_records), timeout_ms, max_records)

    @explains_kafka_arguments("Consumer.poll_batches")
    def poll_batches(
        self, timeout_ms: int = 0, max_records: int = POLL_BATCHES_RECORDS_MAX
    ) -> Coroutine[Any, Any, dict[TopicPartition, list[RecordBatch]]]:
        """Returns records as `poll` does, but as columns: for each partition a list of `RecordBatch`."""
        return self._poll(self._polls(timeout_ms, max_records), timeout_ms, max_records)

    def _polls(self, timeout_ms: int, max_records: int) -> Worker:
        """Returns the worker of the task that polls. Its records in hand count as processed, unless an argument is
        invalid."""
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
        # More than once, because advancing also ends when a callback is due, which the next round calls first.
        while not polled and await self._advance_within(worker, deadline_s):
            left = max_records
            while left and self._iteration.bring():
                batch = self._iteration.take_batch(worker, left)
                if batch is not None:
                    polled.setdefault(TopicPartition(batch.topic, batch.partition), []).append(batch)
                    left -= len(batch)
        return polled

    async def _advance_within(self, worker: Worker, deadline_s: float) -> bool:
        """Advances as `_advance` does; returns False also if no record arrives by the deadline, on the event loop's
        clock. The first call starts the consumer without a deadline: a short timeout would abort every start."""
        self._refuse_closed()
        await self._call_due()  # the deadline does not limit callbacks
        await self._enter()
        return await self._wait_for_more(worker, deadline_s)

    async def _wait_for_more(self, worker: Worker, deadline_s: float | None = None) -> bool:
        """Returns True if a record is ready or a callback has to be called first; False at the end of a bounded read,
        or if nothing arrives by the deadline, on the event loop's clock."""
        try:
            async with asyncio.timeout_at(deadline_s):
                found = await self._iteration.advance()
        except TimeoutError:
            return self._iteration.bring()  # records may have come together with the timeout
        self._in_flight.waited(worker)
        return found

    def processing(self, records: Record | RecordBatch) -> AbstractContextManager[trace.Span]:
        """Returns a context manager in which a `process` span is current: the application's work on a record, or on a
        batch, becomes part of a trace that leads back to the sender. Costs next to nothing without an OpenTelemetry
        SDK. Exceptions of the block are recorded and propagate."""
        return self._tracing.processing(records)

    @property
    def at_end(self) -> bool:
        """True once a bounded read (`end`, `stop_at_end`) has handed over everything up to its end."""
        return self._tasks is not None and self._iteration.at_end

    def _worker(self) -> Worker:
        """Returns the worker of the calling task. Has to be called before any await: `wait_for` runs coroutines in a
        task of its own."""
        try:
            return self._in_flight.worker(asyncio.current_task())
        except RuntimeError:  # no event loop runs yet
            return self._in_flight.worker(None)

    async def _next_deserialized(self, worker: Worker) -> Record:
        """Returns the next record with its key and value as objects. On SerializationError the record is in the
        worker's hand as if handed over: that record is not committed yet, and the next call goes on behind it."""
        assert self._deserializers is not None, "this is called for them"
        return self._deserializers.record(await self._iteration.next(worker))

    async def _next_batch(self, worker: Worker) -> RecordBatch:
        while (batch := self._iteration.take_batch(worker)) is None:
            if not await self._advance(worker):
                raise StopAsyncIteration
        return batch

    async def _enter(self) -> None:
        """Starts the consumer, and joins again if the application was silent; raises PollIntervalExceeded first,
        once."""
        self._assignments.refuse_inside("reading")
        await self._start()
        if not self._closed:
            self._refuse_unsubscribed()
        if self._silence is not None:
            silence, self._silence = self._silence, None
            raise silence
        if self._membership is not None:
            self._membership.come_back()

    def _refuse_closed(self) -> None:
        if self._closed:
            raise InvalidArgument("the consumer is closed", field="consumer")

    async def _advance(self, worker: Worker) -> bool:
        await self._call_due()
        await self._enter()
        return await self._wait_for_more(worker)

    async def _call_due(self) -> None:
        """Calls the callbacks that are due, before anything is read."""
        self._assignments.refuse_inside("reading")
        await self._assignments.call_due()

    def _is_opening(self) -> bool:
        member = self._membership
        # A member that the group has forgotten gets partitions again: its bounded read is not over.
        is_joining = member is not None and (member.pending or not member.member_id)
        return is_joining or self._start_positions.pending or not self._assignments.is_settled

    async def _watch_polls(self) -> None:
        """Leaves the group if the application asks for nothing for max_poll_interval_ms. An application that hangs
        would otherwise keep its partitions from other members for ever, because heartbeats come from a task that does
        not hang."""
        self._progress_seen, self._silent_checks = self._iteration.progress(), 0
        while True:
            await asyncio.sleep(self._options.max_poll_interval_ms / 1000 / POLL_CHECKS)
            await self._check_polls()

    async def _check_polls(self) -> None:
        """Makes one check of the application's progress; leaves the group at the last of POLL_CHECKS checks in a row
        that find none."""
        seen, now = self._progress_seen, self._iteration.progress()
        # Checks are counted, not time: while the whole process stands still the application cannot ask either.
        is_silent = now == seen and self._is_member() and not self._starts
        self._silent_checks = self._silent_checks + 1 if is_silent else 0
        if self._silent_checks == POLL_CHECKS:
            await self._step_out(seen)
            now, self._silent_checks = self._iteration.progress(), 0
        self._progress_seen = now

    def _is_member(self) -> bool:
        return self._membership is not None and bool(self._membership.member_id)

    async def _step_out(self, seen: object) -> None:
        """Leaves the group, unless the application has made progress since `seen`. The application's next read raises
        the error; the read after that joins again."""
        group, limit_ms = self._options.group, self._options.max_poll_interval_ms
        if self._options.auto_commit:
            try:
                await self._commits.commit_existing()
            except StreamHouseError as error:
                log.warning(
                    "the last commit before leaving group %s failed, records will be read again: %s", group, error
                )
        # The commit has taken its time, in which the application may have gone on.
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
            log.warning("leaving group %s failed, the membership ends with its session: %s", group, error)

    # ---- where we are

    @property
    def assignment(self) -> frozenset[TopicPartition]:
        """Partitions being read, or revoked while on_revoked has not returned."""
        return Assigned(self._assignments.cursors)

    async def wait_for_assignment(self, timeout_ms: int | None = None) -> frozenset[TopicPartition]:
        """Returns the assignment as soon as the position at which reading begins is known for at least one partition;
        starts the consumer. In a group with more members than partitions some members have none.

        Raises TimeoutError after timeout_ms (None: never), InvalidArgument once the consumer is closed, else as
        iterating does.
        """
        if timeout_ms is not None:
            check_timeout_ms(timeout_ms)
        deadline_s = None if timeout_ms is None else asyncio.get_running_loop().time() + timeout_ms / 1000
        await self._wait_for_assignment(timeout_ms, deadline_s)
        while not self._is_reading:
            await self._assignments.call_due()
            await self._wait_for_assignment(timeout_ms, deadline_s)
        return self.assignment

    @property
    def _is_reading(self) -> bool:
        return not all(cursor.held for cursor in list(self._reader.cursors.values()))

    async def _wait_for_assignment(self, timeout_ms: int | None, deadline_s: float | None) -> None:
        """Returns once a partition is read, or a callback has to be called first."""
        try:
            async with asyncio.timeout_at(deadline_s) as limit:
                await self._enter()
                self._starts += 1  # the application waits, so it does not hang
                try:
                    while not self._is_reading and not self._closed and not self._assignments.is_due:
                        self._reader.pop()  # without partitions only a failure can be queued; pop raises it
                        await self._reader.wait()
                finally:
                    self._starts -= 1
        except TimeoutError:
            if not limit.expired():
                raise
            raise TimeoutError(f"no partition was assigned within timeout_ms = {timeout_ms}") from None
        self._refuse_closed()

    @property
    def membership(self) -> MembershipState | None:
        """State of the consumer in its group; None without a group, and for partitions given by `assign`."""
        if self._options.group is None or self._assign:
            return None
        member = self._membership
        if member is None or member.is_out:
            return MembershipState(group=self._options.group, member_id="", generation=0, state="out")
        if not member.member_id:
            return MembershipState(group=self._options.group, member_id="", generation=0, state="joining")
        state: Literal["rebalancing", "stable"] = "rebalancing" if self._is_opening() else "stable"
        return MembershipState(self._options.group, member.member_id, member.generation, state)

    @property
    def waiting(self) -> Mapping[TopicPartition, str]:
        """Partitions that cannot be read on at the moment, each with the server's reason."""
        return MappingProxyType(self._reader.waiting)

    def positions(self) -> dict[TopicPartition, int]:
        """Returns the next offset to be handed over, for each partition."""
        return {where: cursor.delivered for where, cursor in self._assignments.cursors.items()}

    async def seek(self, topic: str, partition: int, offset: Start) -> None:
        """Continues at `offset`, an end of the log, or a time. Raises InvalidArgument if the partition is not
        assigned."""
        place = seek_place(offset)
        cursor = self._assigned_cursor(TopicPartition(topic, partition))
        if isinstance(place, int):
            self._move(cursor, place)
        else:
            await self._move_to(place, [cursor], are_named=True)

    async def seek_to_beginning(self, partitions: Sequence[tuple[str, int]] | None = None) -> None:
        """Continues at the first record that still exists, in these or all assigned partitions. Raises as `seek`
        does; then nothing has moved."""
        await self._seek_to("earliest", partitions)

    async def seek_to_end(self, partitions: Sequence[tuple[str, int]] | None = None) -> None:
        """Continues behind the last acknowledged record, in these or all assigned partitions. Raises as `seek`
        does; then nothing has moved."""
        await self._seek_to("latest", partitions)

    async def seek_to_timestamp(
        self, timestamp_ms: int | datetime, partitions: Sequence[tuple[str, int]] | None = None
    ) -> None:
        """Continues at the first record, by offset, that is at least as late as `timestamp_ms` (since 1970-01-01 UTC,
        or a datetime with a time zone), in these or all assigned partitions; at the end of a partition without
        such a record. Raises as `seek` does; then nothing has moved."""
        check_timestamp(timestamp_ms)
        await self._seek_to(timestamp_ms, partitions)

    async def _seek_to(self, at: Place, partitions: Sequence[tuple[str, int]] | None) -> None:
        await self._start()
        asked = list(self._assignments.cursors.values()) if partitions is None else self._assigned_cursors(partitions)
        await self._move_to(at, asked, are_named=partitions is not None)

    async def _move_to(self, at: Place, asked: Sequence[Cursor], *, are_named: bool) -> None:
        """Moves the partitions to the position of `at` in each. If a partition was revoked meanwhile: raises
        InvalidArgument and moves nothing when the application has named the partitions, else leaves that partition
        out."""
        topic_ids = {cursor.where: cursor.topic_id for cursor in asked}
        found = await self._retries.run(lambda: self._offsets.look_up(at, topic_ids))
        cursors = self._assignments.cursors
        still = {where: cursor for where in found if (cursor := cursors.get(where)) is not None}
        gone = [where for where in found if where not in still or still[where].topic_id != topic_ids[where]]
        if gone and are_named:
            raise InvalidArgument(f"{gone[0].topic}/{gone[0].partition} was taken away meanwhile", field="partition")
        for where in found.keys() - gone:
            self._move(still[where], found[where])

    def _move(self, cursor: Cursor, offset: int) -> None:
        # A new cursor, not a new offset in the old: portions on their way for the old cursor are dropped, because that
        # cursor is not live any more.
        moved = Cursor.at(cursor.where, offset, cursor.committed, cursor.end, cursor.topic_id)
        moved.bound = cursor.bound
        if cursor.where in self._assignments.kept:
            moved.end_reading()
            self._assignments.kept[cursor.where] = moved
        else:
            self._reader.put(moved)

    def pause(self, partitions: Sequence[tuple[str, int]]) -> None:
        """Hands over no records of these partitions, and fetches none, until `resume`. The partitions stay assigned,
        and the group does not notice. Raises InvalidArgument if a partition is not assigned; then none is paused."""
        for cursor in self._assigned_cursors(partitions):
            self._reader.pause(cursor)

    def resume(self, partitions: Sequence[tuple[str, int]]) -> None:
        """Continues paused partitions where they stopped, or where a `seek` has moved them. Raises InvalidArgument if a
        partition is not assigned; then none is resumed."""
        for cursor in self._assigned_cursors(partitions):
            self._reader.resume(cursor)

    def paused(self) -> frozenset[TopicPartition]:
        """Returns the assigned partitions that are paused."""
        return frozenset(where for where, cursor in self._assignments.cursors.items() if cursor.paused)

    def _assigned_cursors(self, partitions: Sequence[tuple[str, int]]) -> list[Cursor]:
        return [self._assigned_cursor(TopicPartition(*where)) for where in partitions_of(partitions, "partitions")]

    def _assigned_cursor(self, where: TopicPartition) -> Cursor:
        cursor = self._assignments.cursors.get(where)
        if cursor is None:
            raise InvalidArgument(
                f"{where.topic}/{where.partition} is not assigned to this consumer", field="partition"
            )
        return cursor

    async def lag(self) -> dict[TopicPartition, Lag]:
        """Returns the number of records still to be handed over, for each partition; `Lag.exact` says when it is
        exact."""
        return await self._retries.run(lambda: self._offsets.lag(self.positions(), self._topic_ids()))

    def metrics(self) -> ConsumerMetrics:
        """Returns counters since the consumer was made and gauges of this moment; sends no request, unlike `lag`."""
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

    @explains_kafka_arguments("Consumer.committed")
    async def committed(
        self, partitions: Sequence[tuple[str, int]] | None = None
    ) -> dict[TopicPartition, OffsetAndMetadata | None]:
        """Returns the group's committed position in each of these partitions, assigned or not, or in all assigned
        partitions; None where nothing is committed.

        Raises InvalidArgument without a group, UnknownTopic, UnknownPartition, Unavailable.
        """
        if self._options.group is None:
            raise InvalidArgument("a consumer without a group has committed nothing", field="group")
        if partitions is None:
            await self._start()
            asked = list(self._assignments.cursors)
        else:
            asked = [TopicPartition(*where) for where in partitions_of(partitions, "partitions")]
        return await self._retries.run(lambda: self._committed(asked))

    async def _committed(self, asked: Sequence[TopicPartition]) -> dict[TopicPartition, OffsetAndMetadata | None]:
        await self._check_partitions(asked)
        known = self._topic_ids()
        topic_ids = {where: known.get(where) or (await self._metadata.topic(where.topic)).topic_id for where in asked}
        found = await self._offsets.committed(topic_ids)
        return {where: found.get(where) for where in asked}

    @explains_kafka_arguments("Consumer.commit")
    async def commit(self, offsets: Mapping[tuple[str, int], int | OffsetAndMetadata] | None = None) -> None:
        """Stores the position at which the group continues: behind all processed records, the record in hand of the
        calling task included; or the `offsets` given, with metadata if they are `OffsetAndMetadata`.

        Raises InvalidArgument without a group, IllegalGeneration if a partition was revoked, Unavailable.
        """
        await self._commit(self._worker(), offsets)

    async def _commit(self, worker: Worker, offsets: Mapping[tuple[str, int], int | OffsetAndMetadata] | None) -> None:
        if self._options.group is None:
            raise InvalidArgument("a consumer without a group has nothing to commit to", field="group")
        if offsets is None and self._assignments.is_inside:
            # The records in hand belong to the task that reads, and may be the cause of a failure. And a deleted topic
            # must not keep the partitions of other topics from being committed before they leave.
            await self._commits.commit_existing()
        elif offsets is None:
            worker.held = None
            await self._commits.commit()
        else:
            given = {TopicPartition(*where): at for where, at in committed_positions(offsets).items()}
            await self._commits.commit(
                {where: Position(offset, self._topic_id(where), note) for where, (offset, note) in given.items()}
            )

    def _topic_ids(self) -> dict[TopicPartition, bytes]:
        return {where: cursor.topic_id for where, cursor in self._assignments.cursors.items()}

    def _topic_id(self, where: TopicPartition) -> bytes:
        """Returns the id of the topic that the application has read by this name, also in other partitions; empty if it
        has read none."""
        known = self._topic_ids()
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
            # Refused here, because the group may have assigned the partition to this member again and would accept a
            # position from before the loss.
            if lost := sorted(self._assignments.lost & positions.keys()):
                raise IllegalGeneration(
                    f"group {self._options.group} took {lost[0].topic}/{lost[0].partition} away meanwhile: another "
                    "member may have gone further",
                    generation=self._membership.generation,
                )
            await self._membership.commit_through_rebalance(positions)
        else:
            await self._offsets.commit(positions)

    # ---- assignment

    def _on_given(self, partitions: set[TopicPartition]) -> None:
        """Reads the partitions that the group assigns, except partitions of topics not subscribed to any more: the
        group does not know the new subscription yet."""
        self._has_lost = False
        # A consumer that closes with callbacks is giving its partitions up: the answer to a late heartbeat must not
        # open them again.
        if not self._closed or not self._assignments.callbacks.kinds():
            subscription = self._subscriptions.current
            self._assignments.assign(where for where in partitions if subscription.includes(where.topic))

    def _on_topics_found(self, topics: Mapping[str, int]) -> None:
        if self._closed:
            return
        if self._membership is not None:
            self._membership.read_topics(topics)
        else:
            self._assignments.assign(_partitions_of(topics))

    def _on_owned_changed(self) -> None:
        if self._membership is not None:
            self._membership.owned_changed()

    async def _commit_revoked(self, cursors: Mapping[TopicPartition, Cursor]) -> None:
        """Commits the processed records of revoked partitions; the next owner reads the record in hand
        again."""
        if self._options.auto_commit and self._membership is not None:
            try:
                await self._commits.commit_existing(cursors, self._membership.commit)
            except StreamHouseError as error:
                log.warning("the last commit of revoked partitions failed, records will be read again: %s", error)

    def _on_lost(self) -> None:
        cursors = self._assignments.cursors.values()
        # Before `lose`, which removes the cursors.
        self._has_lost = any(self._in_flight.done_below(cursor) > max(cursor.committed, 0) for cursor in cursors)
        self._assignments.lose()

    def _topic_gone(self, topic: str, topic_id: bytes) -> bool:
        """Loses the partitions of a deleted topic. Returns False for a consumer without membership that names its
        topics: the application then decides.

        The group assigns partitions by the topic's name, so it may not report that the name belongs to another topic
        now: the member starts on that topic anew as soon as it exists. A pattern does the same.
        """
        if self._membership is None and self._subscriptions.current.pattern is None:
            return False
        # By id: the name may belong to another topic by now, whose partitions are read already.
        known = self._topic_ids()
        self._assignments.lose([where for where, held in known.items() if where.topic == topic and held == topic_id])
        self._subscriptions.refresh_soon()
        return True

    async def _check_partitions(self, partitions: Sequence[TopicPartition]) -> None:
        for topic, partition in partitions:
            count = (await self._metadata.topic(topic)).partitions
            if not 0 <= partition < count:
                raise UnknownPartition(f"topic {topic!r} has partitions 0 to {count - 1}, not {partition}", topic=topic)


def _partitions_of(topics: Mapping[str, int]) -> list[TopicPartition]:
    return [TopicPartition(topic, number) for topic, count in topics.items() for number in range(count)]


class Assigned(frozenset[TopicPartition]):
    """A frozenset of partitions. `assignment` is a method in other clients: calling this set raises a TypeError that
    says so."""

    __slots__ = ()
    if not TYPE_CHECKING:

        def __call__(self) -> NoReturn:
            raise TypeError("assignment is an attribute: write consumer.assignment, without ()")

    def __repr__(self) -> str:
        return repr(frozenset(self))


class RecordIterator(AsyncIterator[Record]):
    """Iterator of records for the task that began the `async for`."""

    __slots__ = ("_consumer", "_worker")

    def __init__(self, consumer: Consumer, worker: Worker) -> None:
        self._consumer = consumer
        self._worker = worker

    def __anext__(self) -> Coroutine[Any, Any, Record]:
        self._worker.held = None
        return self._consumer._next(self._worker)


class BatchIterator(AsyncIteration, AsyncIterator[RecordBatch]):
    """Iterator of `Consumer.batches`. A timeout or a cancellation ends one wait, not the iteration."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer
        self._closed = False

    def __anext__(self) -> Coroutine[Any, Any, RecordBatch]:
        worker = self._consumer._worker()
        worker.held = None
        return self._consumer._next_batch(worker) if not self._closed else _ended()

    async def aclose(self) -> None:
        """Ends the iteration; for `contextlib.aclosing`."""
        self._closed = True


async def _ended() -> RecordBatch:
    raise StopAsyncIteration
