"""Clients written by hand, producers and readers: what they do and see goes into the history."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count

from shformat import Codec, ProducerStamp, Records, decode_batch, encode_batch
from shproto.errors import (
    OffsetBelowStart,
    ProducerFenced,
    SequenceGap,
    StreamHouseError,
)
from shproto.services import CoordinatorClient, IngestClient, QueryClient
from shproto.v1 import coordinator_pb2, ingest_pb2, query_pb2, types_pb2

from tests.faults import history as h
from tests.faults.payload import name_of, payload_of
from tests.faults.producers import is_refusal
from tests.simulation.history import History
from tests.simulation.nodes import SimContext

TIMEOUT_MS = 1_000
GIVE_UP_S = 8.0
RECORDS_MAX = 6
PAUSE_S = 0.5
READ_BYTES = 16 * 1024
WAIT_MS = 1_000


@dataclass(frozen=True, slots=True)
class Target:
    """A topic. acks: the least its producers ask for."""

    topic: str
    partitions: int
    min_acks: str


class Producer:
    """One operation after the other. `idempotent`: retries until acknowledged, under one sequence number; else each
    batch is sent once."""

    def __init__(
        self, context: SimContext, history: History, name: str, target: Target, rng: random.Random, idempotent: bool
    ) -> None:
        self._context = context
        self._history = history
        self._name = name
        self._target = target
        self._rng = rng
        self._idempotent = idempotent
        self._coordinator: CoordinatorClient = context.coordinator()
        self._leaders: dict[int, str] = {}
        self._stamps: dict[int, tuple[int, int, int]] = {}  # partition: producer id, epoch, next sequence
        self._numbers: Iterator[int] = count()
        self.stopping = False

    async def run(self) -> None:
        while not self.stopping:
            await asyncio.sleep(self._rng.uniform(0, PAUSE_S))
            await self._produce(self._rng.randrange(self._target.partitions))

    async def _produce(self, partition: int) -> None:
        if self._idempotent and partition not in self._stamps and not await self._identify(partition):
            return
        values = tuple(f"{self._name}.{next(self._numbers)}" for _ in range(self._rng.randrange(1, RECORDS_MAX)))
        acks = "durable" if self._target.min_acks == "durable" or self._rng.random() < 0.2 else "wal"
        operation = h.Produce(self._history.new_id(), self._name, self._target.topic, partition, values, acks)
        self._history.write(operation)
        outcome = await (self._deliver(operation) if self._idempotent else self._once(operation))
        self._history.write(outcome)

    async def _identify(self, partition: int) -> bool:
        try:
            given = await self._coordinator.init_producer(coordinator_pb2.InitProducerRequest())
        except StreamHouseError:
            return False
        self._stamps[partition] = (given.producer_id, given.producer_epoch, 0)
        return True

    async def _once(self, operation: h.Produce) -> h.Event:
        address = await self._leader(operation.partition)
        if not address:
            return h.ProduceFailed(operation.id, True, "nobody leads: not sent")
        try:
            return _produced(operation, await self._send(address, operation, None))
        except StreamHouseError as error:
            self._leaders.pop(operation.partition, None)
            return h.ProduceFailed(operation.id, is_refusal(error), f"{error.reason}: {error.message}")

    async def _deliver(self, operation: h.Produce) -> h.Event:
        """The rules of the SDK's partition queues: a new sequence number only for what cannot have been written."""
        loop, maybe_written = asyncio.get_running_loop(), False
        give_up_at = loop.time() + GIVE_UP_S
        while loop.time() < give_up_at:
            address = await self._leader(operation.partition)
            if not address:
                await asyncio.sleep(self._rng.uniform(0.05, 0.3))
                continue
            producer_id, epoch, sequence = self._stamps[operation.partition]
            try:
                answer = await self._send(address, operation, ProducerStamp(producer_id, epoch, sequence))
            except (SequenceGap, ProducerFenced) as error:
                del self._stamps[operation.partition]
                if maybe_written or not await self._identify(operation.partition):
                    return h.ProduceFailed(operation.id, not maybe_written, f"{error.reason}: {error.message}")
            except StreamHouseError as error:
                maybe_written = maybe_written or not is_refusal(error)
                self._leaders.pop(operation.partition, None)
                if not error.retriable and error.reason != "INTERNAL":
                    break
                await asyncio.sleep(self._rng.uniform(0.02, 0.3))
            else:
                self._stamps[operation.partition] = (producer_id, epoch, sequence + len(operation.values))
                return _produced(operation, answer)
        self._stamps.pop(operation.partition, None)
        return h.ProduceFailed(operation.id, not maybe_written, "given up")

    async def _leader(self, partition: int) -> str:
        if partition not in self._leaders:
            request = coordinator_pb2.GetMetadataRequest(topics=[self._target.topic])
            try:
                topics = (await self._coordinator.get_metadata(request)).topics
            except StreamHouseError:
                return ""
            self._leaders = {leader.partition: leader.address for leader in topics[0].leaders} if topics else {}
        return self._leaders.get(partition, "")

    async def _send(
        self, address: str, operation: h.Produce, stamp: ProducerStamp | None
    ) -> ingest_pb2.ProduceResponse:
        records = Records.from_lists([payload_of(value) for value in operation.values], timestamps_ms=0)
        batch = encode_batch(records, codec=Codec.NONE, producer=stamp)
        request = ingest_pb2.ProduceRequest(
            topic=operation.topic,
            partition=operation.partition,
            batch=batch,
            acks=types_pb2.ACKS_DURABLE if operation.acks == "durable" else types_pb2.ACKS_WAL,
            timeout_ms=TIMEOUT_MS,
        )
        return await IngestClient(self._context.connection([address])).produce(request)


def _produced(operation: h.Produce, answer: ingest_pb2.ProduceResponse) -> h.Produced:
    # A duplicate is acknowledged by the present leader, at an offset that an older epoch may own.
    epoch = 0 if answer.duplicate else answer.epoch
    return h.Produced(operation.id, ((answer.base_offset, len(operation.values)),), epoch)


class Reader:
    """Reads one partition from its beginning, from any query service that answers. `roams`: from another one each
    time, as behind a balancer."""

    def __init__(
        self, context: SimContext, history: History, name: str, topic: str, partition: int, queries: list[str],
        roams: bool,
    ) -> None:  # fmt: skip
        self._context = context
        self._history = history
        self.reader = name
        self._where = (topic, partition)
        self._queries = queries
        self._roams = roams
        self._at_query = 0
        self._offset = 0
        self.waiting = ""

    def positions(self) -> Mapping[tuple[str, int], int]:
        return {self._where: self._offset}

    async def run(self) -> None:
        self._history.write(h.Assigned(self.reader, *self._where, 0))
        while True:
            answered = await self._poll()
            if self._roams or not answered:
                self._at_query = (self._at_query + 1) % len(self._queries)
            if not answered:
                await asyncio.sleep(0.3)

    async def _poll(self) -> bool:
        topic, partition = self._where
        request = query_pb2.FetchRequest(
            topic=topic, partition=partition, offset=self._offset, max_bytes=READ_BYTES, max_wait_ms=WAIT_MS
        )
        query = QueryClient(self._context.connection([self._queries[self._at_query]]))
        try:
            response = await query.fetch(request)
        except StreamHouseError as error:
            self.waiting = f"{error.reason}: {error.message}"
            if error.reason not in ("UNKNOWN_TOPIC", "UNKNOWN_PARTITION"):
                self._history.write(h.ReadFailed(self.reader, error.reason, error.message))
            if isinstance(error, OffsetBelowStart):
                raise
            return False
        self.waiting = response.waiting_reason
        offsets, values = records_of(response, self._offset)
        if offsets:
            self._history.write(h.Polled(self.reader, topic, partition, h.spans_of(offsets), values))
        if response.next_offset < self._offset:
            self._history.write(h.ReadFailed(self.reader, "DATA_LOSS", f"sent back to {response.next_offset}"))
        self._offset = max(self._offset, response.next_offset)
        return True


def records_of(response: query_pb2.FetchResponse, from_offset: int) -> tuple[list[int], tuple[str, ...]]:
    """Offsets and names of the records from `from_offset` on."""
    offsets: list[int] = []
    values: list[str] = []
    for batch in response.batches:
        records = decode_batch(batch)
        for offset, value in zip(records.offsets.tolist(), records.values.to_list(), strict=True):
            if offset >= from_offset:
                offsets.append(offset)
                values.append(name_of(value))
    return offsets, tuple(values)
