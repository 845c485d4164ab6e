"""The Query RPCs: checks requests, shapes responses. See proto/streamhouse/v1/query.proto."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

from shformat import FormatError
from shformat.limits import INT64_MAX
from shproto.errors import DataLoss, InvalidArgument, Overloaded, StreamHouseError, Unavailable
from shproto.limits import INLINE_BYTES_MAX, TOPIC_ID_BYTES
from shproto.rpc import caller_connection, time_left_ms
from shproto.v1 import query_pb2
from shread.chunk_reader import ChunkCache
from shread.counters import fetch_duration_ms, meter
from shread.fetch import fetch
from shread.lookups import Found, Lookups
from shread.reads import Fetched, Reads, Want
from shread.subscribe import Source, SubscribeStream, Window
from shruntime.byte_budget import ByteBudget, ConnectionBudgets
from shruntime.counters import TopicCounter
from shruntime.fair_executor import FairExecutor, QueueFull
from shruntime.tasks import cancel_and_wait

from streamhouse_query.core.plain import plain_records
from streamhouse_query.settings import QuerySettings

T = TypeVar("T")

# Look-ups of a request that run at once: each may hold a chunk or a tail of some MiB.
LOOKUPS_AT_ONCE = 8
# Time before the caller's deadline at which it is sent the cause of the wait: enough for a slow network.
TELL_BEFORE_MS = 500
RETRY_MS = 200


class QueryApi:
    """Implements shproto.services.QueryApi."""

    def __init__(self, reads: Reads, cache: ChunkCache, settings: QuerySettings) -> None:
        self._reads = reads
        self._index = reads.index
        self._clock = reads.clock
        self._counters = reads.counters
        self._lookups = Lookups(reads)
        self._cache = cache
        self._settings = settings
        self._topic_bytes = TopicCounter(
            meter,
            "streamhouse_query_topic_fetched_bytes_total",
            "batch bytes given to readers, by topic",
            settings.metrics_topics_max,
        )
        self._work = FairExecutor(at_once_max=settings.decodes_at_once_max, bytes_max=settings.decode_queue_bytes_max)
        self._connections = ConnectionBudgets(settings.subscribe_connection_bytes)

    async def fetch(self, request: query_pb2.FetchRequest) -> query_pb2.FetchResponse:
        """Returns records from an offset on, with the watermarks.

        Raises InvalidArgument, UnknownTopic, UnknownPartition, OffsetBelowStart, OffsetBeyondEnd, DataLoss,
        Unavailable.
        """
        started_ms = self._clock.monotonic_ms()
        want = await self._want(request)
        response = await self._respond(want, await fetch(self._reads, want), request.format)
        fetch_duration_ms.record(self._clock.monotonic_ms() - started_ms)
        return response

    async def subscribe(
        self, requests: AsyncIterator[query_pb2.SubscribeRequest]
    ) -> AsyncIterator[query_pb2.FetchResponse]:
        """Yields responses of all partitions, as records arrive.

        Raises InvalidArgument; the failure of a partition is in its last response.
        """
        # A stream that ends without a message is answered as a request without positions: with InvalidArgument.
        request = await anext(requests, query_pb2.SubscribeRequest())
        self._check_positions(request)
        # Per connection, because many consumers of a process share a connection.
        with self._connections.budget(caller_connection()) as shared:
            subscription = SubscribeStream(
                self._reads,
                [self._source(request, position) for position in request.positions],
                # The own budget first: a subscription that waits for its own bytes must not hold bytes of the
                # connection.
                budgets=(ByteBudget(self._settings.subscribe_buffer_bytes), shared),
                heartbeat_ms=self._settings.subscribe_heartbeat_ms,
            )
            async with contextlib.aclosing(subscription.responses(requests)) as responses:
                async for response in responses:
                    yield response

    async def lookup_offsets(self, request: query_pb2.LookupOffsetsRequest) -> query_pb2.LookupOffsetsResponse:
        """Returns the offset for each position of the request.

        Raises InvalidArgument, UnknownTopic, UnknownPartition, DataLoss; Unavailable if an answer would be a guess.
        """
        _check("lookups", len(request.lookups), 0, self._settings.subscribe_positions_max)
        # For each request: a large request must not keep the look-ups of others waiting.
        slots = asyncio.Semaphore(LOOKUPS_AT_ONCE)

        async def one(lookup: query_pb2.OffsetLookup) -> query_pb2.LookedUpOffset:
            async with slots:
                offset, timestamp_ms = await self._look_up(lookup)
            return query_pb2.LookedUpOffset(
                topic=lookup.topic, partition=lookup.partition, offset=offset, timestamp_ms=timestamp_ms
            )

        found = await self._told(_all([partial(one, item) for item in request.lookups]))
        return query_pb2.LookupOffsetsResponse(offsets=found)

    async def describe_query(self, request: query_pb2.DescribeQueryRequest) -> query_pb2.DescribeQueryResponse:
        return query_pb2.DescribeQueryResponse(
            cache_bytes=self._cache.size_bytes,
            cache_bytes_max=self._cache.bytes_max,
            cache_hits=self._counters.cache_hits,
            cache_misses=self._counters.cache_misses,
            downloads=self._counters.downloads,
            download_bytes=self._counters.download_bytes,
            segments_indexed=self._index.cluster.segment_count,
            feed_position=self._index.cluster.position,
        )

    # ---- requests

    async def _want(self, request: query_pb2.FetchRequest) -> Want:
        bytes_max = self._bytes_max(request.max_bytes)
        _check("offset", request.offset, 0, INT64_MAX)
        _check("min_bytes", request.min_bytes, 0, bytes_max)
        _check("max_wait_ms", request.max_wait_ms, 0, self._settings.max_wait_ms_max)
        _check_format(request.format)
        _check_topic_id(request.topic_id)
        partition = await self._reads.index_catch_up.find(request.topic, request.partition, request.topic_id)
        return Want(
            partition=partition.key,
            topic=partition.topic,
            offset=request.offset,
            bytes_max=bytes_max,
            bytes_min=request.min_bytes,
            max_wait_ms=request.max_wait_ms,
            tell_after_ms=_tell_after_ms(),
        )

    def _bytes_max(self, asked: int) -> int:
        _check("max_bytes", asked, 0, self._settings.fetch_bytes_max)
        return asked or self._settings.fetch_bytes_default

    def _check_positions(self, request: query_pb2.SubscribeRequest) -> None:
        _check("positions", len(request.positions), 1, self._settings.subscribe_positions_max)
        self._bytes_max(request.max_bytes)
        _check_format(request.format)
        seen = set()
        for position in request.positions:
            if (position.topic, position.partition) in seen:
                name = f"{position.topic}/{position.partition}"
                raise InvalidArgument(f"positions has {name} twice", field="positions", value=name)
            seen.add((position.topic, position.partition))
            # The client gives back the bytes of batches that it was sent; records in plain form have no such sizes.
            if position.HasField("window_bytes") and request.format == query_pb2.FETCH_FORMAT_RECORDS:
                raise InvalidArgument(
                    "window_bytes counts encoded batches, and format is records (2): leave one of them out",
                    field="window_bytes",
                )
        if request.window_updates:
            raise InvalidArgument("window_updates come after the first message", field="window_updates")

    def _source(self, request: query_pb2.SubscribeRequest, position: query_pb2.FetchPosition) -> Source:
        def refuse(error: StreamHouseError) -> query_pb2.FetchResponse:
            return query_pb2.FetchResponse(topic=position.topic, partition=position.partition, error=error.to_detail())

        # Called by the subscription, so that an error of a partition ends the partition alone, in its last response.
        async def resolve() -> Want:
            _check("offset", position.offset, 0, INT64_MAX)
            _check_topic_id(position.topic_id)
            partition = await self._reads.index_catch_up.find(position.topic, position.partition, position.topic_id)
            return Want(
                partition=partition.key,
                topic=partition.topic,
                offset=position.offset,
                bytes_max=self._bytes_max(request.max_bytes),
            )

        window = Window(position.window_bytes if position.HasField("window_bytes") else None)
        return Source(
            resolve=resolve,
            respond=lambda want, fetched: self._respond(want, fetched, request.format),
            refuse=refuse,
            window=window,
        )

    async def _look_up(self, lookup: query_pb2.OffsetLookup) -> Found:
        _check_topic_id(lookup.topic_id)
        partition = await self._reads.index_catch_up.find(lookup.topic, lookup.partition, lookup.topic_id)
        match lookup.spec:
            case query_pb2.OFFSET_SPEC_EARLIEST:
                return self._lookups.earliest(partition)
            case query_pb2.OFFSET_SPEC_LATEST:
                return await self._lookups.latest(partition.key, partition.topic)
            case query_pb2.OFFSET_SPEC_TIMESTAMP:
                return await self._lookups.at_timestamp(partition.key, partition.topic, lookup.timestamp_ms)
            case query_pb2.OFFSET_SPEC_LAST_RECORDS:
                _check("record_count", lookup.record_count, 1, INT64_MAX)
                return await self._lookups.first_of_last(partition.key, partition.topic, lookup.record_count)
        raise InvalidArgument(
            f"spec is {lookup.spec}, must be earliest (1), latest (2), timestamp (3) or last records (4)",
            field="spec",
            value=lookup.spec,
        )

    async def _told(self, answer: Awaitable[T]) -> T:
        """Returns the answer. Raises Unavailable with the known cause just before the caller's deadline."""
        tell_after_ms = _tell_after_ms()
        if tell_after_ms is None:
            return await answer
        try:
            async with asyncio.timeout(tell_after_ms / 1000) as guard:
                return await answer
        except TimeoutError:
            # The look-up itself has timed out, not the time until the caller has to be answered.
            if not guard.expired():
                raise
        trouble = self._reads.store_trouble() or "the object store, or an agent, does not answer"
        raise Unavailable(f"not found within {tell_after_ms:.0f} ms: {trouble}")

    # ---- responses

    async def _respond(self, want: Want, fetched: Fetched, form: int) -> query_pb2.FetchResponse:
        self._counters.fetches += 1
        self._counters.fetched_bytes += fetched.size_bytes
        # Bytes as stored, also for the plain form: rates of topics stay comparable between readers.
        self._topic_bytes.add(want.topic, fetched.size_bytes)
        response = query_pb2.FetchResponse(
            topic=want.topic,
            partition=want.partition[1],
            next_offset=fetched.next_offset,
            high_watermark=fetched.high_watermark,
            log_start_offset=fetched.log_start_offset,
            waiting_reason=fetched.waiting_reason,
        )
        if form != query_pb2.FETCH_FORMAT_RECORDS:
            response.batches.extend(fetched.batches)
            return response
        make = partial(plain_records, fetched.batches, want.offset, fetched.next_offset, want.bytes_max)
        try:
            # Small responses are made at once: the hop to a thread would cost more than the work.
            if fetched.decoded_bytes <= INLINE_BYTES_MAX:
                records, response.next_offset = make()
            else:
                records, response.next_offset = await self._work.run(caller_connection(), make, fetched.size_bytes)
        except QueueFull as full:
            raise Overloaded(
                f"decode_queue_bytes_max is {self._settings.decode_queue_bytes_max} bytes, {full.queued_bytes} wait",
                retry_after_ms=RETRY_MS,
                limit="decode_queue_bytes_max",
                value=full.queued_bytes,
            ) from full
        except FormatError as error:  # its CRC was right, so its writer wrote an invalid batch
            raise DataLoss(
                f"{want.topic}/{want.partition[1]}: records from offset {want.offset} on cannot be decoded: {error}",
                topic=want.topic,
                partition=want.partition[1],
                base_offset=want.offset,
                end_offset=fetched.next_offset,
            ) from error
        response.records.extend(records)
        return response


def _check(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidArgument(f"{name} is {value}, must be {low} to {high}", field=name, value=value, limit=high)


def _check_topic_id(topic_id: bytes) -> None:
    if topic_id:
        _check("length of topic_id", len(topic_id), TOPIC_ID_BYTES, TOPIC_ID_BYTES)


def _check_format(form: int) -> None:
    if form not in query_pb2.FetchFormat.values():
        raise InvalidArgument(f"format is {form}, must be encoded (1) or records (2)", field="format", value=form)


def _tell_after_ms() -> float | None:
    """Returns the ms until the caller must be answered; None without a deadline."""
    left_ms = time_left_ms()
    # A quarter of a short deadline, so that a caller with little patience is still answered in time.
    return None if left_ms is None else left_ms - min(TELL_BEFORE_MS, left_ms / 4)


async def _all(calls: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """Returns all results in order; the first error ends the others and is raised unchanged."""
    tasks = [asyncio.ensure_future(call()) for call in calls]
    try:
        return [await task for task in tasks]
    finally:
        await cancel_and_wait(*tasks)
