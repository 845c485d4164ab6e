"""A producer's batch of one partition, from its first record to its outcome; pure.

Owns: the records until they are encoded, then the bytes; sequence number, deadline, outcome. Does not own: when the
batch is sent and which batch goes before it (partition_queue.py), time, the network.
Invariants: the state changes only along NEXT. A batch has one outcome. Encoding twice under the same stamp returns the
very same bytes. A batch with an outcome holds no records.
"""

from collections.abc import Callable, Sequence
from enum import Enum, auto
from itertools import repeat
from typing import Any, Protocol

import numpy as np
from shformat import (
    DEFAULT_LIMITS,
    Codec,
    FormatError,
    Header,
    HeadersColumn,
    ProducerStamp,
    Records,
    decode_batch,
    encode_batch,
    encode_lists,
)
from shproto import errors

# A record's cost in a batch besides its bytes (lengths, timestamp: at most 30), and in memory meanwhile (list entries);
# so that a batch of empty records ends too: 32,768 of them in 1 MiB.
RECORD_OVERHEAD_BYTES = 32
# A record alone may fill a batch: the limit of the format, minus its header, tables and this record's columns.
RECORD_BYTES_MAX = DEFAULT_LIMITS.batch_bytes_max - 64 * 1024


class BatchState(Enum):
    """State of a batch. EXPIRED: past the deadline, never sent again, about to be failed."""

    OPEN = auto()
    CLOSED = auto()
    IN_FLIGHT = auto()
    EXPIRED = auto()
    DONE = auto()


NEXT: dict[BatchState, tuple[BatchState, ...]] = {
    BatchState.OPEN: (BatchState.CLOSED,),
    BatchState.CLOSED: (BatchState.IN_FLIGHT, BatchState.EXPIRED),
    BatchState.IN_FLIGHT: (BatchState.CLOSED, BatchState.EXPIRED, BatchState.DONE),  # CLOSED again for a retry
    BatchState.EXPIRED: (BatchState.DONE,),
    BatchState.DONE: (),
}


class Outcome(Enum):
    """Outcome of a try, as far as its error says."""

    NOT_WRITTEN = auto()  # may be sent again as it is
    UNKNOWN = auto()  # may have been written; send again, with the same sequence number
    OUT_OF_SEQUENCE = auto()  # not written, and the sequence number does not follow
    FATAL = auto()  # not written, and never will be


# An agent may learn of a new topic late: the coordinator decides if the topic exists.
_NOT_WRITTEN = (errors.Overloaded, errors.DiskFull, errors.UnknownTopic, errors.UnknownPartition)
_OUT_OF_SEQUENCE = (errors.SequenceGap, errors.ProducerFenced, errors.UnknownProducer)


def outcome_of(error: errors.StreamHouseError) -> Outcome:
    """Returns the outcome of a try that was answered with `error`."""
    refused_by_leader = isinstance(error, errors.NotLeader) and error.details.get("outcome") == errors.NOT_WRITTEN
    if refused_by_leader or isinstance(error, _NOT_WRITTEN):
        return Outcome.NOT_WRITTEN
    if isinstance(error, _OUT_OF_SEQUENCE):
        return Outcome.OUT_OF_SEQUENCE
    # An error that promises nothing counts as unknown: a leader may lose its lease after the write.
    return Outcome.UNKNOWN if error.retriable else Outcome.FATAL


class BatchTrace(Protocol):
    """Spans of a batch; `streamhouse.tracing.SendTrace`."""

    @property
    def traceparent(self) -> str:
        """W3C traceparent of the first recorded span; empty if no span is recorded."""

    @property
    def writes_headers(self) -> bool:
        """True if records are given headers."""

    def sent(self, first: int, caller: Any) -> None:
        """Records that the records from position `first` on were sent in the span `caller`."""

    def with_contexts(
        self, headers: list[tuple[Header, ...]] | None, count: int, size_bytes: int, size_bytes_max: int
    ) -> list[tuple[Header, ...]] | None:
        """Returns the headers of `count` records with the contexts of their spans added, within `size_bytes_max`."""

    def end(self, error: Exception | None, base_offset: int, record_count: int) -> None:
        """Ends the spans with the outcome of the batch. base_offset is -1 if the offset is not known."""


class ProducerBatch:
    """Records of one partition that travel together. `trace`: records the spans; None if nothing can be recorded."""

    __slots__ = (
        "_encoded",
        "_encoded_stamp",
        "_headers",
        "_is_encoded",
        "_keys",
        "_parts",
        "_timestamps_ms",
        "_values",
        "_waiters",
        "base_offset",
        "deadline_ms",
        "error",
        "is_sent",
        "last_error",
        "maybe_written",
        "partition",
        "record_count",
        "seen",
        "size_bytes",
        "stamp",
        "state",
        "topic",
        "trace",
    )

    def __init__(self, topic: str, partition: int, deadline_ms: float, trace: BatchTrace | None = None) -> None:
        self.topic = topic
        self.partition = partition
        self.deadline_ms = deadline_ms
        self.trace = trace
        self.state = BatchState.OPEN
        self.record_count = 0
        self.size_bytes = 0  # that the records count for, before encoding
        # Records that came as columns, and those before them; the lists have the records behind.
        self._parts: list[Records] = []
        self._values: list[bytes | None] = []
        self._timestamps_ms: list[int] = []
        # None while no record has a key, or headers.
        self._keys: list[bytes | None] | None = None
        self._headers: list[tuple[Header, ...]] | None = None
        self._is_encoded = False
        self._encoded = b""
        self._encoded_stamp: ProducerStamp | None = None
        self.stamp: ProducerStamp | None = None
        self.is_sent = False  # handed to a leader's stream at least once
        self.maybe_written = False
        self.last_error: errors.StreamHouseError | None = None
        self.base_offset = -1
        self.error: Exception | None = None
        self.seen = False  # the application learnt of the error
        self._waiters: list[Callable[[], object]] = []

    # ---- records

    def append(
        self, value: bytes | None, key: bytes | None, headers: tuple[Header, ...], timestamp_ms: int, size_bytes: int
    ) -> int:
        """Appends a record. Returns the position in the batch."""
        index, rows = self.record_count, len(self._values)
        self._values.append(value)
        self._timestamps_ms.append(timestamp_ms)
        if self._keys is not None:
            self._keys.append(key)
        elif key is not None:
            # The first key of the batch: the column begins now, so that batches without keys have none.
            self._keys = [None] * rows
            self._keys.append(key)
        if self._headers is not None:
            self._headers.append(headers)
        elif headers:
            self._headers = [()] * rows
            self._headers.append(headers)
        self.size_bytes += size_bytes
        self.record_count = index + 1
        return index

    def extend(
        self,
        values: Sequence[bytes | None],
        keys: Sequence[bytes | None] | None,
        headers: Sequence[tuple[Header, ...]] | None,
        timestamps_ms: Sequence[int],
        size_bytes: int,
    ) -> int:
        """Appends many records. Returns the position of the first."""
        index, rows = self.record_count, len(self._values)
        if keys is not None:
            if self._keys is None:
                self._keys = [None] * rows
            self._keys.extend(keys)
        elif self._keys is not None:
            self._keys.extend(repeat(None, len(values)))
        if headers is not None:
            if self._headers is None:
                self._headers = [()] * rows
            self._headers.extend(headers)
        elif self._headers is not None:
            self._headers.extend(repeat((), len(values)))
        self._values.extend(values)
        self._timestamps_ms.extend(timestamps_ms)
        self.size_bytes += size_bytes
        self.record_count = index + len(values)
        return index

    def extend_columns(self, records: Records, size_bytes: int) -> int:
        """Appends many records that are columns already. Returns the position of the first."""
        index = self.record_count
        self._close_rows()
        self._parts.append(records)
        self.size_bytes += size_bytes
        self.record_count = index + len(records)
        return index

    def _close_rows(self) -> None:
        """Makes columns of the lists, if they hold any record."""
        if self._values:
            rows = Records.from_lists(self._values, self._keys, self._timestamps_ms, self._headers)
            self._parts.append(rows)
            self._values, self._timestamps_ms, self._keys, self._headers = [], [], None, None

    def encode(self, codec: Codec) -> bytes:
        """Returns the record batch under the present stamp. Raises InvalidBatch."""
        try:
            if not self._is_encoded and self._parts:
                self._encoded = encode_batch(self._columns(), codec=codec, producer=self.stamp)
                self._is_encoded = True
                self._drop_records()
            elif not self._is_encoded:
                headers = self._headers
                if self.trace is not None:
                    # Contexts only where they fit: a record that `send` accepted is sent in any case.
                    headers = self.trace.with_contexts(headers, self.record_count, self.size_bytes, RECORD_BYTES_MAX)
                self._encoded = encode_lists(
                    self._values, self._keys, self._timestamps_ms, headers, codec=codec, producer=self.stamp
                )
                # From here on the bytes serve all tries: records and bytes together would take the memory twice.
                self._is_encoded = True
                self._drop_records()
            elif self.stamp != self._encoded_stamp:
                # Decoded again instead of kept: a batch gets another stamp only after a sequence gap.
                self._encoded = encode_batch(decode_batch(self._encoded), codec=codec, producer=self.stamp)
        except FormatError as error:
            raise errors.InvalidBatch(f"the records cannot be encoded: {error}", what=error.what) from error
        self._encoded_stamp = self.stamp
        return self._encoded

    def _columns(self) -> Records:
        """Returns all records of a batch that holds columns."""
        self._close_rows()
        records = Records.concat(self._parts)
        headers = records.headers
        if self.trace is not None and self.trace.writes_headers:
            pairs = None if headers is None else list(map(tuple, headers.to_list()))
            with_contexts = self.trace.with_contexts(pairs, self.record_count, self.size_bytes, RECORD_BYTES_MAX)
            headers = None if with_contexts is None else HeadersColumn.from_list(with_contexts)
        return Records(
            offsets=np.arange(self.record_count),  # each part counts from 0
            timestamps_ms=records.timestamps_ms,
            keys=records.keys,
            values=records.values,
            headers=headers,
        )

    def _drop_records(self) -> None:
        self._parts = []
        self._values, self._timestamps_ms, self._keys, self._headers = [], [], None, None

    @property
    def traceparent(self) -> str:
        """W3C traceparent of the span that the leader's work belongs to; empty if nothing is recorded."""
        return "" if self.trace is None else self.trace.traceparent

    # ---- states

    def move_to(self, state: BatchState) -> None:
        """Changes the state along NEXT."""
        assert state in NEXT[self.state], f"{self.state.name} is never followed by {state.name}"
        self.state = state

    @property
    def is_decided(self) -> bool:
        """True once no answer changes the outcome any more."""
        return self.state is BatchState.DONE or self.state is BatchState.EXPIRED

    @property
    def is_done(self) -> bool:
        """True once the outcome is known."""
        return self.state is BatchState.DONE

    def resolve(self, base_offset: int) -> None:
        """Acknowledges the batch. base_offset: offset of its first record, -1 without an offset (acks=none)."""
        self.base_offset = base_offset
        self._finish()

    def fail(self, error: Exception) -> None:
        """Ends the batch with the error that the futures of its records raise."""
        self.error = error
        self._finish()

    def _finish(self) -> None:
        self.move_to(BatchState.DONE)
        self._drop_records()  # futures keep the batch for as long as the application keeps them
        self._encoded = b""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter()

    def when_done(self, waiter: Callable[[], object]) -> None:
        """Calls `waiter()` as soon as the batch, which is not done yet, has its outcome."""
        self._waiters.append(waiter)

    def end_spans(self) -> None:
        """Ends the spans of the batch with its outcome."""
        if self.trace is not None:
            self.trace.end(self.error, self.base_offset, self.record_count)

    # ---- errors

    def is_outcome_unknown(self, error: errors.StreamHouseError) -> bool:
        """Returns True if the batch may be in the log although `error` refuses it for good: an earlier try got no
        answer, and the leader that refused this one does not know the writes of this producer."""
        return self.maybe_written and outcome_of(error) is Outcome.OUT_OF_SEQUENCE

    def refusal(self, error: errors.StreamHouseError) -> errors.StreamHouseError:
        """Returns the error of a batch that is not sent again after `error`: the same, unless an earlier try may have
        been written."""
        if not self.is_outcome_unknown(error):
            return error
        return errors.OutcomeUnknown(
            f"{self.topic}/{self.partition}: {self.record_count} records may or may not have been written. An "
            "earlier try got no answer, and the leader that was asked again does not have this producer's history: "
            "another agent took over, or the metadata was restored. Sent once more they could be there twice, so the "
            "batch has failed. Read the partition once it is settled (the leader's answer was "
            f"{error.reason}: {error.message})",
            topic=self.topic,
            partition=self.partition,
            record_count=self.record_count,
            refusal=error.reason,
        )


def timed_out(delivery_timeout_ms: int, last_error: errors.StreamHouseError | None) -> errors.StreamHouseError:
    """Returns the error of a batch past its deadline: of the kind of the last error, which names the cause."""
    waited = f"not acknowledged within delivery_timeout_ms = {delivery_timeout_ms}"
    if last_error is None:
        return errors.Unavailable(f"{waited}; no answer from the leader", limit="delivery_timeout_ms")
    error = type(last_error)(f"{waited}; last error: {last_error.message}")
    error.details = dict(last_error.details)
    return error
