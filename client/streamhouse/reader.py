"""Fetches for a consumer: one Subscribe stream over all its partitions, opened again whenever they change.

Owns: the stream, fail-over between query services, what is received and not handed over. Does not own: which
partitions there are, commits.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Literal, cast

from shproto.errors import (
    DataLoss,
    OffsetBelowStart,
    OffsetBeyondEnd,
    StreamHouseError,
    Unavailable,
    UnknownTopic,
)
from shproto.v1 import query_pb2
from shruntime.tasks import Backoff

from streamhouse.core.decoding import end_of_loss, portions_of
from streamhouse.core.options import ConsumerOptions, Start
from streamhouse.core.positions import Cursor, Portion
from streamhouse.metadata import MetadataCache
from streamhouse.peers import Peers
from streamhouse.records import TopicPartition

log = logging.getLogger(__name__)

RETRY_FIRST_MS = 50
RETRY_MAX_MS = 1_000
# A partition that cannot be read is left out of the stream this long, for the others' sake.
PARTITION_RETRY_MS = 1_000
# Half of what a query service takes for one subscription, with its default settings.
POSITIONS_MAX = 500

Lookup = Callable[[Start, Mapping[TopicPartition, bytes]], Awaitable[dict[TopicPartition, int]]]


class Reader:
    """`run` is a task of the owner. Cursors come and go with `put` and `drop`; `pop` gives what was received.

    `lookup` finds the earliest or latest offsets of partitions of topics with these ids, for on_out_of_range.
    `topic_gone(topic, topic_id)`: whether the owner takes care of cursors whose topic is not there any more.
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
        self._portions: deque[Portion] = deque()
        self._queued_bytes = 0
        self._failures: deque[tuple[Cursor | None, StreamHouseError]] = deque()
        self._news = asyncio.Event()
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._addresses: deque[str] = deque()
        self._backoff = Backoff(RETRY_FIRST_MS, RETRY_MAX_MS)
        self._failing_since: float | None = None

    # ---- the owner's side

    def put(self, cursor: Cursor) -> None:
        """Reads from this cursor from now on, instead of an earlier one of the partition."""
        self._end(self.cursors.get(cursor.where))
        self.cursors[cursor.where] = cursor
        self._changed.set()
        self._news.set()

    def drop(self, where: TopicPartition) -> None:
        """Stops reading the partition; what was received of it is not handed over."""
        self._end(self.cursors.pop(where, None))
        self.waiting.pop(where, None)
        self._changed.set()
        self._news.set()

    def _end(self, cursor: Cursor | None) -> None:
        if cursor is None:
            return
        cursor.live = False
        self._portions = deque(portion for portion in self._portions if portion.cursor.live)
        self._failures = deque(item for item in self._failures if item[0] is None or item[0].live)
        self._set_queued_bytes(sum(portion.size_bytes for portion in self._portions))

    def topic_ids(self) -> dict[TopicPartition, bytes]:
        """Of which topic each cursor's partition is."""
        return {where: cursor.topic_id for where, cursor in self.cursors.items()}

    def pop(self) -> Portion | None:
        """What was received first; None when there is nothing. Raises a failure when its turn comes; the partition
        is tried again after that."""
        if self._portions:
            portion = self._portions.popleft()
            self._set_queued_bytes(self._queued_bytes - portion.size_bytes)
            return portion
        if self._failures:
            cursor, error = self._failures.popleft()
            if cursor is not None:
                cursor.failed, cursor.failing_since_ms = False, None
            self._failing_since = None
            self._changed.set()
            raise error
        self._news.clear()
        return None

    async def wait(self) -> None:
        """Until there is something new since `pop` had nothing: records, a failure, other cursors."""
        await self._news.wait()

    def fail(self, error: StreamHouseError, cursor: Cursor | None = None) -> None:
        """Lets the application see `error` once it has taken what was received before."""
        if cursor is not None:
            cursor.failed = True
        elif any(other is None for other, _ in self._failures):
            return  # one at a time: it has not seen the one before
        self._failures.append((cursor, error))
        self._news.set()

    def notify(self) -> None:
        """Wakes the application's side to look again."""
        self._news.set()

    def _set_queued_bytes(self, size_bytes: int) -> None:
        self._queued_bytes = size_bytes
        if size_bytes < self._options.prefetch_bytes_max:
            self._room.set()
        else:
            self._room.clear()

    # ---- the stream

    async def run(self) -> None:
        """Keeps streams open over the cursors that want more, until cancelled."""
        self._room.set()
        while True:
            self._changed.clear()
            wanted = [cursor for cursor in self.cursors.values() if cursor.wants_more]
            parts = [wanted[at : at + POSITIONS_MAX] for at in range(0, len(wanted), POSITIONS_MAX)]
            tasks = [asyncio.create_task(self._changed.wait())]
            tasks += [asyncio.create_task(self._keep_reading(part)) for part in parts]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                results = await asyncio.gather(*tasks, return_exceptions=True)
            for result in results:
                if isinstance(result, Exception):
                    raise result  # a defect ends the owner's task

    async def _keep_reading(self, cursors: Sequence[Cursor]) -> Literal[True]:
        """One stream after the other over the same cursors; returns when they need another set of positions."""
        while True:
            try:
                async with aclosing(await self._open(cursors)) as responses:
                    by_partition = {cursor.where: cursor for cursor in cursors}
                    async for response in responses:
                        self._failing_since = None
                        self._backoff.reset()
                        if not await self._take(by_partition, response):
                            return True
                raise Unavailable("the query service ended the stream")
            except StreamHouseError as error:
                await self._stream_failed(error)

    async def _open(self, cursors: Sequence[Cursor]) -> AsyncGenerator[query_pb2.FetchResponse, None]:
        if not self._addresses:
            self._addresses.extend(await self._metadata.query_addresses())
        if not self._addresses:
            raise Unavailable("no query service has a session with the coordinator")
        positions = [
            query_pb2.FetchPosition(
                topic=c.where.topic, partition=c.where.partition, offset=c.fetch_offset, topic_id=c.topic_id
            )
            for c in cursors
        ]
        request = query_pb2.SubscribeRequest(
            positions=positions, max_bytes=self._options.fetch_bytes, format=query_pb2.FETCH_FORMAT_ENCODED
        )
        stream = self._peers.query((self._addresses[0],)).subscribe(_only(request))
        return cast("AsyncGenerator[query_pb2.FetchResponse, None]", stream)

    async def _stream_failed(self, error: StreamHouseError) -> None:
        """Goes to the next address; to the application only once nothing has worked for retry_timeout_ms."""
        if self._addresses:
            self._addresses.popleft()
        now_s = asyncio.get_running_loop().time()
        if self._failing_since is None:
            self._failing_since = now_s
            log.warning("reading from the query service failed, trying again: %s", error)
        if not error.retriable or now_s - self._failing_since > self._options.retry_timeout_ms / 1000:
            self.fail(error)
        await asyncio.sleep(max(error.retry_after_ms, self._backoff.next_ms()) / 1000)

    async def _take(self, wanted: dict[TopicPartition, Cursor], response: query_pb2.FetchResponse) -> bool:
        """Whether the stream may go on as it is."""
        where = TopicPartition(response.topic, response.partition)
        cursor = wanted.get(where)
        if cursor is None or not cursor.live:
            return True
        try:
            if response.HasField("error"):
                raise StreamHouseError.from_detail(response.error)
            self._accept(cursor, response)
        except StreamHouseError as error:
            await self._partition_failed(cursor, error)
            return False
        await self._room.wait()
        return True

    def _accept(self, cursor: Cursor, response: query_pb2.FetchResponse) -> None:
        """Checks, decodes and queues; the cursor moves only if all of it is good."""
        portions, last_epoch = portions_of(cursor, response.batches, response.next_offset)
        self._note(cursor, response)
        cursor.failing_since_ms = None
        if last_epoch:
            cursor.last_epoch = last_epoch
        cursor.fetch_offset = response.next_offset
        self._portions.extend(portions)
        self._set_queued_bytes(self._queued_bytes + sum(portion.size_bytes for portion in portions))
        if portions or cursor.end is not None:  # a bounded read may be over: there is nothing from its beginning on
            self._news.set()

    def _note(self, cursor: Cursor, response: query_pb2.FetchResponse) -> None:
        cursor.high_watermark = response.high_watermark
        cursor.log_start_offset = response.log_start_offset
        reason = response.waiting_reason
        if reason and self.waiting.get(cursor.where) != reason:
            log.warning("%s/%d waits at offset %d: %s", *cursor.where, cursor.fetch_offset, reason)
            self.waiting[cursor.where] = reason
        elif not reason:
            self.waiting.pop(cursor.where, None)

    # ---- a partition's failures

    async def _partition_failed(self, cursor: Cursor, error: StreamHouseError) -> None:
        """By policy; otherwise tried again later, or the application's to decide."""
        policy = self._options.on_out_of_range
        if isinstance(error, UnknownTopic) and self._topic_gone(cursor.where.topic, cursor.topic_id):
            return
        if isinstance(error, (OffsetBelowStart, OffsetBeyondEnd)) and policy != "error":
            offset = (await self._lookup(policy, {cursor.where: cursor.topic_id}))[cursor.where]
            log.warning("%s/%d: %s; going on at the %s offset %d", *cursor.where, error, policy, offset)
            self._jump(cursor, offset)
        elif isinstance(error, DataLoss) and self._options.on_data_loss == "skip" and end_of_loss(error, cursor):
            offset = end_of_loss(error, cursor)
            log.warning("%s/%d: %s; going on at offset %d", *cursor.where, error, offset)
            self._jump(cursor, offset)
        elif error.retriable and self._may_retry(cursor):
            log.warning("%s/%d at offset %d: %s", *cursor.where, cursor.fetch_offset, error)
            cursor.failed = True
            asyncio.get_running_loop().call_later(
                max(error.retry_after_ms, PARTITION_RETRY_MS) / 1000, self._retry, cursor
            )
        else:
            self.fail(error, cursor)

    def _may_retry(self, cursor: Cursor) -> bool:
        now_ms = asyncio.get_running_loop().time() * 1000
        if cursor.failing_since_ms is None:
            cursor.failing_since_ms = now_ms
        return now_ms - cursor.failing_since_ms < self._options.retry_timeout_ms

    def _retry(self, cursor: Cursor) -> None:
        cursor.failed = False
        self._changed.set()

    def _jump(self, cursor: Cursor, offset: int) -> None:
        if cursor.live:
            self._portions.append(Portion(cursor, None, offset))
            cursor.fetch_offset = offset
            cursor.last_epoch = 0
            self._news.set()


async def _only(request: query_pb2.SubscribeRequest) -> AsyncIterator[query_pb2.SubscribeRequest]:
    yield request
