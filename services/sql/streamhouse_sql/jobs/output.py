"""Writes the output of a job, each record under its own number.

Owns: the numbers, the records that are not acknowledged yet, a task per partition. Does not own: the writer, which
sends records again until their fate is known.
Invariants: a record's number per partition follows from the micro-batches before it alone. Records of a partition are
written in the order of their numbers. At most `sql_job_output_bytes_max` wait; then the job computes nothing new.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from shcluster.sequenced_writer import Fence
from shformat import BytesColumn, HeadersColumn
from shproto.errors import DataLoss, StreamHouseError
from shproto.limits import RETRY_FIRST_MS, RETRY_MS_MAX
from shruntime.tasks import Backoff, cancel_and_wait, sleep_ms

from streamhouse_sql.jobs.encode import HEADER, Encoded
from streamhouse_sql.jobs.patience import until_available

log = logging.getLogger(__name__)

# Records of one call of a writer, which cuts them into batches itself and has several under way. Durable records wait
# for their segment, a second or so: the more a call has, the less that costs.
WRITE_BYTES = 32 * 1024 * 1024
# Partitions that are fenced at once.
FENCES_AT_ONCE = 32


class Writer(Protocol):
    """Writes numbered records to a partition (shcluster.SequencedWriter)."""

    async def fence(self) -> Fence: ...

    async def write(
        self,
        first_sequence: int,
        values: BytesColumn,
        keys: BytesColumn | None = None,
        *,
        headers: HeadersColumn | None = None,
        timestamps_ms: NDArray[np.int64] | int,
    ) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Records:
    first_sequence: int
    records: Encoded
    timestamp_ms: int


class _Partition:
    """Output partition. `next_sequence`: of the record that is added next; `written`: up to there, all is
    acknowledged."""

    def __init__(self, number: int, writer: Writer, next_sequence: int, *, is_fenced: bool) -> None:
        self.number = number
        self.writer = writer
        self.next_sequence = next_sequence
        self.written = next_sequence
        self.is_fenced = is_fenced
        self.waiting: deque[_Records] = deque()
        self.has_records = asyncio.Event()

    def add(self, records: Encoded, timestamp_ms: int) -> None:
        self.waiting.append(_Records(first_sequence=self.next_sequence, records=records, timestamp_ms=timestamp_ms))
        self.next_sequence += len(records)
        self.has_records.set()

    def take(self) -> list[_Records]:
        """Takes records for one call, those of at least one micro-batch."""
        taken: list[_Records] = []
        size_bytes = 0
        while self.waiting and (not taken or size_bytes + self.waiting[0].records.size_bytes <= WRITE_BYTES):
            taken.append(self.waiting.popleft())
            size_bytes += taken[-1].records.size_bytes
        if not self.waiting:
            self.has_records.clear()
        return taken


class Output:
    """Output of a job to its topic. `fence` comes first, then `begin`; `run` writes beside `add`."""

    def __init__(self, new_writer: Callable[[int], Writer], *, bytes_max: int) -> None:
        self._new_writer = new_writer
        self._bytes_max = bytes_max
        self._writers: list[Writer] = []
        self._partitions: list[_Partition] = []
        self._waiting_bytes = 0
        self._acknowledged = asyncio.Event()
        self._changed = asyncio.Event()
        self.trouble = ""

    async def fence(self, partitions: int) -> list[int]:
        """Refuses former owners of the job in all partitions from now on. Returns the next sequence of each. Waits for
        logs of former leaders, and says in `trouble` for which. Raises ProducerFenced, DataLoss."""
        self._writers = [self._new_writer(number) for number in range(partitions)]
        slots = asyncio.Semaphore(FENCES_AT_ONCE)

        async def one(writer: Writer) -> int:
            async with slots:
                return (await self._fenced(writer)).next_sequence

        tasks = [asyncio.create_task(one(writer), name="job fence") for writer in self._writers]
        try:
            return [await task for task in tasks]
        finally:
            await cancel_and_wait(*tasks)

    def begin(self, sequences: Sequence[int]) -> None:
        """Goes on at these sequences, of the next records per partition."""
        self._partitions = [
            _Partition(number, writer, sequences[number], is_fenced=True) for number, writer in enumerate(self._writers)
        ]

    @property
    def sequences(self) -> tuple[int, ...]:
        """Sequence of the next record per partition."""
        return tuple(partition.next_sequence for partition in self._partitions)

    async def room(self) -> None:
        """Returns once there is room for more output."""
        while self._waiting_bytes > self._bytes_max:
            self._acknowledged.clear()
            await self._acknowledged.wait()

    def add(self, number: int, records: Encoded, partitions: int, timestamp_ms: int) -> None:
        """Adds the records of a micro-batch to a topic with so many partitions."""
        for new in range(len(self._partitions), partitions):
            self._partitions.append(_Partition(new, self._new_writer(new), 0, is_fenced=False))
        if not len(records):
            return
        chosen = records.partitions(number, partitions)
        order = np.argsort(chosen, kind="stable")
        places = chosen[order]
        ends = np.flatnonzero(np.diff(places, append=-1)) + 1
        start = 0
        for end in ends.tolist():
            partition = self._partitions[int(places[start])]
            part = records if end - start == len(records) else records.take(order[start:end])
            partition.add(part, timestamp_ms)
            self._waiting_bytes += part.size_bytes
            start = end
        self._changed.set()

    async def written(self, sequences: Sequence[int]) -> None:
        """Returns once all records before these sequences are acknowledged."""
        while any(
            partition.written < sequence for partition, sequence in zip(self._partitions, sequences, strict=False)
        ):
            self._acknowledged.clear()
            await self._acknowledged.wait()

    async def run(self) -> None:
        """Writes added records, until cancelled. Raises ProducerFenced, SequenceGap, DataLoss, UnknownTopic."""
        running: dict[int, asyncio.Task[None]] = {}
        try:
            while True:
                self._changed.clear()
                for partition in self._partitions:
                    if partition.number not in running:
                        running[partition.number] = asyncio.create_task(
                            self._write_all(partition), name=f"job output {partition.number}"
                        )
                for task in running.values():
                    if task.done():
                        task.result()
                await self._changed.wait()
        finally:
            await cancel_and_wait(*running.values())

    async def _write_all(self, partition: _Partition) -> None:
        try:
            if not partition.is_fenced:
                fence = await self._fenced(partition.writer)
                if fence.next_sequence:
                    raise DataLoss(f"output partition {partition.number} is new, and has records of the job")
            while True:
                await partition.has_records.wait()
                taken = partition.take()
                await self._write(partition, taken)
                partition.written = taken[-1].first_sequence + len(taken[-1].records)
                self._waiting_bytes -= sum(item.records.size_bytes for item in taken)
                self._acknowledged.set()
        finally:
            self._changed.set()

    async def _write(self, partition: _Partition, taken: Sequence[_Records]) -> None:
        values = BytesColumn.from_arrow(pa.chunked_array([item.records.values for item in taken]))
        keys = headers = None
        if taken[0].records.keys is not None:
            keys = BytesColumn.from_arrow(pa.chunked_array([item.records.keys for item in taken]))
        if taken[0].records.ops is not None:
            ops = BytesColumn.from_arrow(pa.chunked_array([item.records.ops for item in taken]))
            headers = HeadersColumn.of_columns([(HEADER, ops)])
        counts = [len(item.records) for item in taken]
        timestamps_ms = np.repeat(np.array([item.timestamp_ms for item in taken], np.int64), counts)
        backoff = Backoff(RETRY_FIRST_MS, RETRY_MS_MAX)
        while True:
            try:
                await partition.writer.write(
                    taken[0].first_sequence, values, keys, headers=headers, timestamps_ms=timestamps_ms
                )
                self.trouble = ""
                return
            except StreamHouseError as error:
                if not error.retriable:
                    raise
                self._note(error)
            await sleep_ms(backoff.next_ms())
            await self._fenced(partition.writer)

    async def _fenced(self, writer: Writer) -> Fence:
        fence = await until_available(writer.fence, self._note)
        self.trouble = ""
        return fence

    def _note(self, error: StreamHouseError) -> None:
        self.trouble = error.message
        log.info("output of a job waits: %s", error.message)
