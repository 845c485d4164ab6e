"""Collects a producer's records into batches, one open batch per partition.

Owns: the queues of all partitions, and the deadline of a new batch. Does not own: when a batch is sent (sender.py), its
order among others (core/partition_queue.py), bytes of the buffer.
Invariants: records of a partition lie in batches in the order in which they were appended. A batch holds at most
batch_bytes, or a single larger record.
"""

import asyncio

from shformat import Header

from streamhouse.core.arrow_records import ArrowRecords
from streamhouse.core.options import ProducerOptions
from streamhouse.core.partition_queue import SMALL_IN_FLIGHT_MAX, PartitionQueue
from streamhouse.core.producer_batch import ProducerBatch
from streamhouse.core.record_checks import Indices, RecordColumns
from streamhouse.tracing import SendTrace, tracer


class RecordAccumulator:
    """Belongs to the event loop that runs when it is made."""

    def __init__(self, options: ProducerOptions) -> None:
        self._options = options
        self._batch_bytes = options.batch_bytes
        # The answer to a durable batch takes seconds, however much is sent meanwhile: small batches need not wait.
        self._small_in_flight_max = options.max_in_flight if options.acks == "durable" else SMALL_IN_FLIGHT_MAX
        self.loop = asyncio.get_running_loop()
        self._queues: dict[tuple[str, int], PartitionQueue] = {}

    def queues(self) -> list[PartitionQueue]:
        """Returns the queues of all partitions that were written to."""
        return list(self._queues.values())

    def queue(self, topic: str, partition: int) -> PartitionQueue:
        """Returns the partition's queue, made at the first call."""
        queue = self._queues.get((topic, partition))
        if queue is None:
            # Kept for the life of the producer: the queue holds the partition's sequence numbers.
            queue = self._queues[topic, partition] = PartitionQueue(
                topic,
                partition,
                idempotent=self._options.idempotent,
                small_in_flight_max=self._small_in_flight_max,
            )
        return queue

    def append(
        self,
        queue: PartitionQueue,
        value: bytes | None,
        key: bytes | None,
        headers: tuple[Header, ...],
        timestamp_ms: int,
        size_bytes: int,
        deadline_ms: float | None,
    ) -> tuple[ProducerBatch, int, bool]:
        """Appends a record. Returns its batch, its position there, and True if the batch was opened now, which the
        caller reports to the sender. deadline_ms: of a batch that is opened; None: delivery_timeout_ms from now."""
        batch = queue.open_batch
        if batch is not None and batch.size_bytes + size_bytes <= self._batch_bytes:
            return batch, batch.append(value, key, headers, timestamp_ms, size_bytes), False
        batch = self._open(queue, self.deadline_ms() if deadline_ms is None else deadline_ms)
        return batch, batch.append(value, key, headers, timestamp_ms, size_bytes), True

    def extend(
        self, queue: PartitionQueue, records: RecordColumns | ArrowRecords, indices: Indices, size_bytes: int
    ) -> tuple[ProducerBatch, int, bool]:
        """Appends some of the records, which fit into a single batch. Returns their batch, the position of the first
        there, and True if the batch was opened now."""
        batch = queue.open_batch
        opens = batch is None or batch.size_bytes + size_bytes > self._batch_bytes
        if batch is None or opens:
            batch = self._open(queue, self.deadline_ms())
        return batch, records.append_to(batch, indices, size_bytes), opens

    def deadline_ms(self) -> float:
        """Returns when a record sent now fails, on the event loop's clock."""
        return self.loop.time() * 1000 + self._options.delivery_timeout_ms

    def _open(self, queue: PartitionQueue, deadline_ms: float) -> ProducerBatch:
        """Begins a batch and returns it; a full batch before goes into the queue."""
        # None without an OpenTelemetry SDK: spans that record nothing would still cost for every batch.
        trace: SendTrace | None = None
        if (found := tracer()) is not None:
            trace = SendTrace(
                found,
                queue.topic,
                queue.partition,
                self._options.acks,
                self._options.client_id,
                writes_headers=self._options.trace_headers,
            )
        batch = ProducerBatch(queue.topic, queue.partition, deadline_ms, trace)
        queue.open(batch, self.loop.time() * 1000, self._options.linger_ms)
        return batch
