"""Fetches for a consumer: a Subscribe stream over all its partitions, opened again whenever they change.

Owns: the streams, fail-over between query services, records received and not handed over. Does not own: the choice of
partitions, commits.
Invariants: received records wait by partition and are handed over by turns between partitions; those of a paused
partition wait aside. The server is asked for no more of a partition than its window, and no more than
prefetch_bytes_max is decoded in all, except for a single batch of any size of each partition.
"""

import asyncio
import logging
import random
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Literal, cast

from shcluster.peers import Peers
from shformat import MissingExtra
from shformat.limits import MIB
from shproto.errors import (
    DataLoss,
    OffsetBelowStart,
    OffsetBeyondEnd,
    StreamHouseError,
    Unavailable,
    UnknownTopic,
)
from shproto.limits import RETRY_FIRST_MS, RETRY_MS_MAX
from shproto.v1 import query_pb2
from shruntime.round_robin import RoundRobinQueue
from shruntime.tasks import Backoff, cancel_and_wait

from streamhouse.core.decoding import Encoded, check_response, decode, end_of_loss
from streamhouse.core.options import ConsumerOptions, Place
from streamhouse.core.positions import Cursor, Portion
from streamhouse.metadata import MetadataCache
from streamhouse.records import TopicPartition

log = logging.getLogger(__name__)


# A partition that cannot be read is left out of the stream this long: opening the stream again interrupts all other
# partitions.
PARTITION_RETRY_MS = 1_000
# Half of the positions that a query service accepts in one subscription, with its default settings.
POSITIONS_MAX = 500
# Three quarters of prefetch_bytes_max are shared out as windows. A batch is sent whole, beyond its window if need be,
# and a batch without room holds up the stream; the last quarter absorbs such batches. A window is at least a block,
# which is enough to keep a partition going.
WINDOWS_SHARE = 0.75
WINDOW_BYTES_MIN = MIB
# Consumed bytes are reported in quarters of a window: until then the server has the rest of the window to send.
WINDOW_UPDATES = 4

Failure = StreamHouseError | MissingExtra
_Queue = RoundRobinQueue[Cursor | None, Portion | Failure]
Lookup = Callable[[Place, Mapping[TopicPartition, bytes]], Awaitable[dict[TopicPartition, int]]]


class _Subscription:
    """The request side of a Subscribe stream: positions first, then window updates."""

    def __init__(self, cursors: Sequence[Cursor], window_bytes: int, fetch_bytes: int) -> None:
        self._update_bytes = max(1, window_bytes // WINDOW_UPDATES)
        self._places = {cursor: place for place, cursor in enumerate(cursors)}
        self._consumed = [0] * len(cursors)
        self._due: deque[query_pb2.WindowUpdate] = deque()
        self._update_due = asyncio.Event()
        self._closed = False
        positions = [
            query_pb2.FetchPosition(
                topic=cursor.where.topic,
                partition=cursor.where.partition,
                offset=cursor.fetch_offset,
                topic_id=cursor.topic_id,
                # Less what is here already: a stream that is opened often must not be sent a window each time.
                window_bytes=max(0, window_bytes - cursor.received_bytes),
            )
            for cursor in cursors
        ]
        self._first = query_pb2.SubscribeRequest(
            positions=positions, max_bytes=fetch_bytes, format=query_pb2.FETCH_FORMAT_ENCODED
        )

    def consumed(self, cursor: Cursor, size_bytes: int) -> None:
        """Opens the cursor's window by consumed bytes; ignores cursors of other streams."""
        place = self._places.get(cursor)
        if place is None:
            return
        self._consumed[place] += size_bytes
        if self._consumed[place] >= self._update_bytes:
            self._due.append(query_pb2.WindowUpdate(position=place, size_bytes=self._consumed[place]))
            self._consumed[place] = 0
            self._update_due.set()

    async def requests(self) -> AsyncIterator[query_pb2.SubscribeRequest]:
        """Yields the requests of the stream, until `close`."""
        yield self._first
        while not self._closed:
            if self._due:
                updates = list(self._due)
                self._due.clear()
                yield query_pb2.SubscribeRequest(window_updates=updates)
            else:
                self._update_due.clear()
                await self._update_due.wait()

    def close(self) -> None:
        """Ends the requests: gRPC waits for further requests even after the call has failed."""
        self._closed = True
        self._update_due.set()


class Reader:
    """Receives records for the cursors that the owner adds with `put` and removes with `drop`; `pop` returns them. The
    owner runs `run` as a task.

    `lookup` finds the earliest or latest offsets of partitions of topics with these ids, for on_out_of_range.
    `topic_gone(topic, topic_id)`: returns True if the owner handles the cursors of a topic that does not exist any
    more.
    """

    def __init__(
        self,
        options: ConsumerOptions,
        peers: Peers,
        metadata: MetadataCache,
        lookup: Lookup,
        topic_gone: Callable[[str, bytes], bool],
    ) -> None:
        self._options = options
        self._peers = peers
        self._metadata = metadata
        self._lookup = lookup
        self._topic_gone = topic_gone
        self.cursors: dict[TopicPartition, Cursor] = {}
        self.waiting: dict[TopicPartition, str] = {}
        # Key None: errors of no partition. At most one error per key, behind the records received before.
        self._received: _Queue = RoundRobinQueue()
        self._set_aside: _Queue = RoundRobinQueue()  # portions of paused partitions
        self._received_bytes = 0
        self._has_failure = False
        self._arrived = asyncio.Event()
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._subscriptions: dict[_Subscription, None] = {}  # in the order of opening
        self._addresses: deque[str] = deque()
        self._backoff = Backoff(RETRY_FIRST_MS, RETRY_MS_MAX)
        self._failing_since: float | None = None

    # ---- the owner's side

    def put(self, cursor: Cursor) -> None:
        """Reads from this cursor from now on, instead of an earlier cursor of the partition; takes over its `paused`
        and `held`."""
        earlier = self.cursors.get(cursor.where)
        if earlier is not None:
            cursor.set_paused(earlier.paused)
            cursor.held = earlier.held
        self._end(earlier)
        self.cursors[cursor.where] = cursor
        self._changed.set()
        self._arrived.set()

    def release(self, cursor: Cursor) -> None:
        """Begins to fetch for a cursor that was held."""
        cursor.held = False
        self._changed.set()
        self._arrived.set()

    def drop(self, where: TopicPartition) -> None:
        """Stops reading the partition and drops its received records."""
        self._end(self.cursors.pop(where, None))
        self.waiting.pop(where, None)
        self._changed.set()
        self._arrived.set()

    def pause(self, cursor: Cursor) -> None:
        """Stops fetching for the cursor and handing over its records, until `resume`. Received records stay until
        another partition needs the room. Idempotent."""
        if not cursor.paused:
            cursor.set_paused(True)
            self._move(cursor, self._received, self._set_aside)
            self._changed.set()
            self._room.set()  # set-aside portions can make room now, see `_drop_set_aside`

    def resume(self, cursor: Cursor) -> None:
        """Continues at the position where the cursor was paused. Idempotent."""
        if cursor.paused:
            cursor.set_paused(False)
            self._move(cursor, self._set_aside, self._received)
            self._changed.set()
            self._arrived.set()

    @staticmethod
    def _move(cursor: Cursor, source: _Queue, target: _Queue) -> None:
        for item in source.drop(cursor):
            target.put(cursor, item)

    def _queue_of(self, cursor: Cursor | None) -> _Queue:
        """Returns the queue for received portions of the cursor."""
        return self._set_aside if cursor is not None and cursor.paused else self._received

    def _end(self, cursor: Cursor | None) -> None:
        if cursor is not None:
            cursor.end_reading()
            self._forget(cursor)

    def _forget(self, cursor: Cursor) -> None:
        """Drops the received portions of the cursor."""
        for item in self._queue_of(cursor).drop(cursor):
            if isinstance(item, Portion):
                self.consumed(item)

    def rewind(self, cursor: Cursor, offset: int) -> None:
        """Fetches the cursor's partition from `offset` again; drops its received records."""
        # Responses to the requests of before are on their way, and do not continue at the new offset.
        cursor.restarts += 1
        cursor.fetch_offset, cursor.last_epoch = offset, 0
        cursor.failed = False
        self._forget(cursor)
        self._changed.set()

    def set_end(self, cursor: Cursor, end: int | None) -> None:
        """Sets the end of a bounded read of the partition; None: no end."""
        cursor.end = end
        self._changed.set()

    def topic_ids(self) -> dict[TopicPartition, bytes]:
        """Returns the topic id of each cursor's partition."""
        return {where: cursor.topic_id for where, cursor in self.cursors.items()}

    def pop(self) -> Portion | None:
        """Returns the first received portion of the partition whose turn it is; None if nothing is queued. The caller
        reports the portion as `consumed` or returns the rest with `put_back`.

        Raises a queued error when its turn comes; after that the partition is fetched again.
        """
        if not self._received:
            # Cleared here and not in `wait`: what arrives between the two still wakes the caller.
            self._arrived.clear()
            return None
        cursor, item = self._received.take()
        if isinstance(item, Portion):
            return item
        if cursor is not None:
            cursor.failed, cursor.failing_since_ms = False, None
        else:
            self._has_failure = False
        self._failing_since = None
        self._changed.set()
        raise item

    def put_back(self, portion: Portion) -> None:
        """Queues a portion with records left, to be popped at the next turn of its partition."""
        if portion.cursor.live:
            self._queue_of(portion.cursor).put_back(portion.cursor, portion)
            self._arrived.set()
            self._room.set()  # all portions of a paused partition may be here now, and can be dropped
        else:
            self.consumed(portion)

    def consumed(self, portion: Portion) -> None:
        """Gives the portion's bytes back. Idempotent."""
        size_bytes, portion.size_bytes = portion.size_bytes, 0
        self._received_bytes -= size_bytes
        portion.cursor.received_bytes -= size_bytes
        self._room.set()
        for subscription in self._subscriptions:
            subscription.consumed(portion.cursor, size_bytes)

    async def wait(self) -> None:
        """Returns once records, an error or a change of cursors has arrived since `pop` returned None."""
        await self._arrived.wait()

    @property
    def received_bytes(self) -> int:
        """Decoded bytes of all partitions, received and not handed over."""
        return self._received_bytes

    @property
    def has_more(self) -> bool:
        """True if anything waits to be popped."""
        return bool(self._received)

    @property
    def has_portion(self) -> bool:
        """True if the next `pop` returns a portion and raises no error."""
        return isinstance(next(iter(self._received), None), Portion)

    def fail(self, error: Failure, cursor: Cursor | None = None) -> None:
        """Queues `error` for the application, behind the records received before."""
        if cursor is not None:
            cursor.failed = True
        elif self._has_failure:
            return  # the application has not seen the earlier error
        else:
            self._has_failure = True
        self._queue_of(cursor).put(cursor, error)
        self._arrived.set()

    def notify(self) -> None:
        """Wakes the tasks in `wait`."""
        self._arrived.set()

    # ---- the stream

    async def run(self) -> None:
        """Keeps streams open over the cursors that want more, until cancelled."""
        while True:
            self._changed.clear()
            wanted = [cursor for cursor in self.cursors.values() if cursor.wants_more]
            parts = [wanted[at : at + POSITIONS_MAX] for at in range(0, len(wanted), POSITIONS_MAX)]
            # Streams keep their positions: any change of the cursors opens them anew.
            tasks = [asyncio.create_task(self._changed.wait())]
            tasks += [asyncio.create_task(self._keep_reading(part)) for part in parts]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                await cancel_and_wait(*tasks)
            for task in tasks:
                if not task.cancelled():
                    task.result()  # a defect ends the owner's task

    @property
    def _window_bytes(self) -> int:
        """Decoded bytes that each partition may have ahead of the application."""
        share = int(self._options.prefetch_bytes_max * WINDOWS_SHARE) // max(1, len(self.cursors))
        return max(share, min(WINDOW_BYTES_MIN, self._options.prefetch_bytes_max))

    async def _keep_reading(self, cursors: Sequence[Cursor]) -> Literal[True]:
        """Opens streams over the same cursors, a new stream when the last has ended; returns when they need another set
        of positions."""
        while True:
            address = ""
            try:
                address = await self._address()
                if await self._read_stream(address, cursors):
                    return True
                raise Unavailable("the query service ended the stream")
            except StreamHouseError as error:
                await self._stream_failed(address, error)

    async def _read_stream(self, address: str, cursors: Sequence[Cursor]) -> bool:
        """Returns True when the cursors need another set of positions, False when the server ended the stream."""
        subscription = _Subscription(cursors, self._window_bytes, self._options.fetch_bytes)
        wanted = {cursor.where: (cursor, cursor.restarts) for cursor in cursors}
        stream = cast(
            "AsyncGenerator[query_pb2.FetchResponse, None]",
            self._peers.query((address,)).subscribe(subscription.requests()),
        )
        self._subscriptions[subscription] = None
        try:
            async with aclosing(stream) as responses:
                async for response in responses:
                    self._failing_since = None
                    self._backoff.reset()
                    cursor, restarts = wanted.get(TopicPartition(response.topic, response.partition), (None, 0))
                    if cursor is not None and not await self._take(cursor, restarts, response):
                        return True
            return False
        finally:
            subscription.close()
            del self._subscriptions[subscription]

    async def _address(self) -> str:
        if not self._addresses:
            found = await self._metadata.query_addresses()
            if not self._addresses:  # another stream may have filled it meanwhile
                # Shuffled, so that consumers spread over the query services: the coordinator lists them to all in the
                # same order.
                self._addresses.extend(random.sample(found, len(found)))
        if not self._addresses:
            raise Unavailable("no query service has a session with the coordinator")
        return self._addresses[0]

    async def _stream_failed(self, address: str, error: StreamHouseError) -> None:
        """Leaves the address, once for all streams that fail there. The application gets the error only after no stream
        has worked for retry_timeout_ms."""
        if self._addresses and self._addresses[0] == address:
            self._addresses.popleft()
        now_s = asyncio.get_running_loop().time()
        if self._failing_since is None:
            self._failing_since = now_s
            log.warning("reading from the query service failed, trying again: %s", error)
        if not error.retriable or now_s - self._failing_since > self._options.retry_timeout_ms / 1000:
            self.fail(error)
        await asyncio.sleep(max(error.retry_after_ms, self._backoff.next_ms()) / 1000)

    async def _take(self, cursor: Cursor, restarts: int, response: query_pb2.FetchResponse) -> bool:
        """Queues the records of a response. Returns True if the stream may go on, False if it needs new positions."""
        if not cursor.live or cursor.restarts != restarts:
            return True  # the streams are about to be opened anew
        try:
            if response.HasField("error"):
                raise StreamHouseError.from_detail(response.error)
            found = check_response(cursor, response.batches, response.next_offset)
            self._note(cursor, response)
            for encoded in found:
                await self._wait_for_room(encoded.decoded_bytes)
                # A seek, a rewind or a loss of the partition may have come while there was no room.
                if not cursor.live or cursor.restarts != restarts:
                    return True
                self._accept(cursor, encoded)
        except StreamHouseError as error:
            await self._partition_failed(cursor, error)
            return False
        except MissingExtra as error:  # a codec; trying again would not install it, so the application decides
            self.fail(error, cursor)
            return False
        cursor.failing_since_ms = None
        if response.next_offset > cursor.fetch_offset:
            self._jump(cursor, response.next_offset, cursor.last_epoch)
        elif not found and cursor.end is not None:
            self._arrived.set()  # a bounded read may be over: the log has nothing behind its start
        return True

    async def _wait_for_room(self, size_bytes: int) -> None:
        """Returns once size_bytes more may be decoded; always when nothing else is held."""
        while self._received_bytes and self._received_bytes + size_bytes > self._options.prefetch_bytes_max:
            if not self._drop_set_aside():
                self._room.clear()
                await self._room.wait()

    def _drop_set_aside(self) -> bool:
        """Drops the received records of a paused partition, to be fetched again after `resume`: partitions that are
        read must not wait for room that nothing gives back. Returns False if no records can be dropped."""
        for cursor in self.cursors.values():
            # Only if all received bytes are set aside. The application may still have a portion; fetching from before
            # that portion's end would hand records over twice.
            if cursor.paused and cursor.received_bytes and self._set_aside_bytes(cursor) == cursor.received_bytes:
                self.rewind(cursor, cursor.delivered)
                return True
        return False

    def _set_aside_bytes(self, cursor: Cursor) -> int:
        return sum(item.size_bytes for item in self._set_aside.of(cursor) if isinstance(item, Portion))

    def _accept(self, cursor: Cursor, encoded: Encoded) -> None:
        """Decodes and queues a portion; the cursor moves only if all bytes are good."""
        portion = decode(cursor, encoded)
        cursor.fetch_offset, cursor.last_epoch = encoded.end_offset, encoded.epoch
        cursor.received_bytes += portion.size_bytes
        self._received_bytes += portion.size_bytes
        self._queue_of(cursor).put(cursor, portion)
        self._arrived.set()

    def _note(self, cursor: Cursor, response: query_pb2.FetchResponse) -> None:
        cursor.high_watermark = response.high_watermark
        cursor.log_start_offset = response.log_start_offset
        reason = response.waiting_reason
        if reason and self.waiting.get(cursor.where) != reason:
            log.warning("%s/%d waits at offset %d: %s", *cursor.where, cursor.fetch_offset, _unnamed(cursor, reason))
            self.waiting[cursor.where] = reason
        elif not reason:
            self.waiting.pop(cursor.where, None)

    # ---- a partition's failures

    async def _partition_failed(self, cursor: Cursor, error: StreamHouseError) -> None:
        """Acts on an error by policy; otherwise fetches again later, or leaves the error to the application."""
        policy = self._options.on_out_of_range
        if isinstance(error, UnknownTopic) and self._topic_gone(cursor.where.topic, cursor.topic_id):
            return
        if isinstance(error, (OffsetBelowStart, OffsetBeyondEnd)) and policy != "error":
            offset = (await self._lookup(policy, {cursor.where: cursor.topic_id}))[cursor.where]
            message = _unnamed(cursor, error.message)
            log.warning("%s/%d: %s; going on at the %s offset %d", *cursor.where, message, policy, offset)
            self._jump(cursor, offset)
        elif isinstance(error, DataLoss) and self._options.on_data_loss == "skip" and end_of_loss(error, cursor):
            offset = end_of_loss(error, cursor)
            log.warning("%s/%d: %s; going on at offset %d", *cursor.where, _unnamed(cursor, error.message), offset)
            self._jump(cursor, offset)
        elif error.retriable and self._may_retry(cursor, error):
            cursor.failed = True
            asyncio.get_running_loop().call_later(
                max(error.retry_after_ms, PARTITION_RETRY_MS) / 1000, self._retry, cursor
            )
        else:
            self.fail(error, cursor)

    def _may_retry(self, cursor: Cursor, error: StreamHouseError) -> bool:
        now_ms = asyncio.get_running_loop().time() * 1000
        if cursor.failing_since_ms is None:  # logged once, not with every try
            message = _unnamed(cursor, error.message)
            log.warning("%s/%d at offset %d, trying again: %s", *cursor.where, cursor.fetch_offset, message)
            cursor.failing_since_ms = now_ms
        return now_ms - cursor.failing_since_ms < self._options.retry_timeout_ms

    def _retry(self, cursor: Cursor) -> None:
        cursor.failed = False
        self._changed.set()

    def _jump(self, cursor: Cursor, offset: int, last_epoch: int = 0) -> None:
        """Continues at `offset`, without records before it."""
        if cursor.live:
            self._queue_of(cursor).put(cursor, Portion(cursor=cursor, batch=None, end_offset=offset))
            cursor.fetch_offset = offset
            cursor.last_epoch = last_epoch
            self._arrived.set()


def _unnamed(cursor: Cursor, text: str) -> str:
    """Returns a text about the cursor's partition without the leading name, for log lines that begin with the name."""
    name = f"{cursor.where.topic}/{cursor.where.partition}"
    return f"it{rest}" if (rest := text.removeprefix(name)).startswith(" ha") else text.removeprefix(f"{name}: ")
