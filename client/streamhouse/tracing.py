"""Spans of producers and consumers, and the W3C trace context that records carry in their `traceparent` header.

Names and attributes follow OpenTelemetry's semantic conventions for messaging: `send TOPIC` (PRODUCER), its context is
the creation context of its records; `receive TOPIC` (CLIENT) for each portion handed over; `process TOPIC` (CONSUMER)
on request of the application. The last two link to the creation contexts. Without an installed SDK nothing here runs
for single records: the SDK is looked up once per batch and portion.

Owns: the tracer of the last SDK found. Does not own: the SDK, the application's spans.
Invariants: a `traceparent` header set by the application stays unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue
from shformat import DEFAULT_LIMITS, Header, HeadersColumn

from streamhouse.records import TRACEPARENT, TRACEPARENT_BYTES, Record, RecordBatch

# Number of links that an SDK keeps per span by default.
LINKS_MAX = 128
# Upper bound of a header's bytes in a batch before compression: name, value, and 8 for their lengths and the count.
HEADER_BYTES = len(TRACEPARENT) + TRACEPARENT_BYTES + 8

_PROPAGATOR = TraceContextTextMapPropagator()
_WELL_FORMED = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_known: tuple[trace.TracerProvider, trace.Tracer] | None = None
# True if `tracer` has found an SDK in its last call; read by code that runs for single records.
is_on = False


def tracer() -> trace.Tracer | None:
    """Returns the installed SDK's tracer; None while there is no SDK, so that nothing can be recorded."""
    global _known, is_on
    provider = trace.get_tracer_provider()
    is_on = not isinstance(provider, trace.ProxyTracerProvider | trace.NoOpTracerProvider)
    if not is_on:
        return None
    if _known is None or _known[0] is not provider:
        _known = provider, provider.get_tracer("streamhouse.client")
    return _known[1]


# ---- contexts


def traceparent_of(span: trace.Span) -> str:
    """Returns the W3C traceparent of a span; empty for an invalid span."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, trace.set_span_in_context(span, Context()))
    return carrier.get(TRACEPARENT, "")


def _creation_contexts(headers: HeadersColumn | None) -> list[trace.SpanContext]:
    """Returns the distinct span contexts that records carry, at most LINKS_MAX, computed by columns."""
    if headers is None or not len(headers.names):
        return []
    names, values = headers.names, headers.values
    name_sizes, value_sizes = np.diff(names.ends, prepend=0), np.diff(values.ends, prepend=0)
    found = np.flatnonzero((name_sizes == len(TRACEPARENT)) & (value_sizes == TRACEPARENT_BYTES))
    if not len(found):
        return []
    # By length first, then by bytes: comparing every header as text would be a loop over records.
    texts = _of_length(names.data, names.ends[found], len(TRACEPARENT))
    wanted = np.frombuffer(TRACEPARENT.encode(), np.uint8)
    parents = _of_length(values.data, values.ends[found], TRACEPARENT_BYTES)[(texts == wanted).all(axis=1)]
    distinct, firsts = np.unique(parents.view(f"V{TRACEPARENT_BYTES}").ravel(), return_index=True)
    in_order = distinct[np.argsort(firsts)][:LINKS_MAX]
    return [context for value in in_order if (context := _span_context(value.tobytes())) is not None]


def _of_length(data: bytes | memoryview, ends: NDArray[np.int64], size: int) -> NDArray[np.uint8]:
    """Returns the strings of one length that end at `ends`, uint8 of shape (n, size)."""
    found: NDArray[np.uint8] = np.frombuffer(data, np.uint8)[ends[:, None] + np.arange(-size, 0)]
    return found


def _span_context(value: bytes) -> trace.SpanContext | None:
    if not _WELL_FORMED.fullmatch(value):
        return None
    context = trace.get_current_span(_PROPAGATOR.extract({TRACEPARENT: value.decode()}, Context())).get_span_context()
    return context if context.is_valid else None


# ---- sending


class SendTrace:
    """The `send` spans of a batch: a span for each application span in which its records were sent, and a root span for
    records sent outside of any.

    Each span lasts from its first record to the batch's outcome, and its records carry its context. The first span is
    the parent of the leader's work on the batch; the others link to the first.
    """

    __slots__ = ("_attributes", "_last", "_name", "_runs", "_spans", "_tracer", "_writes_headers")

    def __init__(
        self, tracer: trace.Tracer, topic: str, partition: int, acks: str, client_id: str, *, writes_headers: bool
    ) -> None:
        self._tracer = tracer
        self._writes_headers = writes_headers
        self._name = f"send {topic}"
        self._attributes: dict[str, AttributeValue] = {
            **_attributes(topic, partition, "send", client_id),
            "messaging.streamhouse.acks": acks,
        }
        self._runs: list[tuple[int, trace.Span]] = []  # first record of each run, and the application's span
        self._spans: dict[trace.Span, trace.Span] = {}  # send span by application span
        self._last: trace.Span | None = None

    def sent(self, first: int, caller: trace.Span) -> None:
        """Records that from position `first` of the batch on records were sent in the span `caller`."""
        # Compared by identity, for every record: most records come from the span of the record before.
        if caller is not self._last:
            self._last = caller
            self._runs.append((first, caller))
            if caller not in self._spans:
                self._spans[caller] = self._start(caller)

    def _start(self, caller: trace.Span) -> trace.Span:
        context = trace.set_span_in_context(caller, Context())
        earlier = next((span for span in self._spans.values() if span.is_recording()), None)
        links = [] if earlier is None else [trace.Link(earlier.get_span_context())]
        return self._tracer.start_span(
            self._name, context, trace.SpanKind.PRODUCER, attributes=self._attributes, links=links
        )

    @property
    def traceparent(self) -> str:
        """W3C traceparent of the first recorded span; empty if no span is recorded."""
        return next((traceparent_of(span) for span in self._spans.values() if span.is_recording()), "")

    @property
    def writes_headers(self) -> bool:
        """True if records are given the contexts of their spans."""
        return self._writes_headers

    def with_contexts(
        self, headers: list[tuple[Header, ...]] | None, count: int, size_bytes: int, size_bytes_max: int
    ) -> list[tuple[Header, ...]] | None:
        """Returns the headers of the batch's `count` records with the contexts of their spans added. Skips records that
        have a traceparent or no room for another header, and all records of a batch that would grow beyond
        size_bytes_max."""
        if not self._writes_headers or size_bytes + count * HEADER_BYTES > size_bytes_max:
            return headers
        carried = {caller: _header_of(span) for caller, span in self._spans.items() if span.is_recording()}
        if not carried:
            return headers
        found: list[tuple[Header, ...]] = []
        for start, stop, caller in self._ended_runs(count):
            own = carried.get(caller, ())
            if headers is None:
                found += [own] * (stop - start)
            else:
                found += [pairs + own if _takes_context(pairs) else pairs for pairs in headers[start:stop]]
        return found

    def end(self, error: Exception | None, base_offset: int, record_count: int) -> None:
        """Ends the spans with the outcome of the batch. base_offset is -1 if the offset is not known."""
        counts, firsts = dict.fromkeys(self._spans, 0), dict[trace.Span, int]()
        for start, stop, caller in self._ended_runs(record_count):
            counts[caller] += stop - start
            firsts.setdefault(caller, start)
        for caller, span in self._spans.items():
            span.set_attribute("messaging.batch.message_count", counts[caller])
            if error is not None:
                _failed(span, error)
            elif base_offset >= 0:
                span.set_attribute("messaging.streamhouse.offset", base_offset + firsts[caller])
            span.end()

    def _ended_runs(self, record_count: int) -> Iterator[tuple[int, int, trace.Span]]:
        """Yields start, stop and span of each run of records, now that there are `record_count`."""
        stops = [*(first for first, _ in self._runs[1:]), record_count]
        for (start, caller), stop in zip(self._runs, stops, strict=True):
            yield start, stop, caller


def _header_of(span: trace.Span) -> tuple[Header, ...]:
    return ((TRACEPARENT, traceparent_of(span).encode()),)


def _takes_context(headers: tuple[Header, ...]) -> bool:
    return len(headers) < DEFAULT_LIMITS.headers_per_record_max and all(name != TRACEPARENT for name, _ in headers)


# ---- receiving


class ReceiveTracing:
    """Spans of a consumer: `receive` for portions handed over, `process` for the application's work on records."""

    __slots__ = ("_client_id", "_group")

    def __init__(self, group: str | None, client_id: str) -> None:
        self._group = group
        self._client_id = client_id

    def _attributes(self, topic: str, partition: int, operation: str, count: int | None) -> dict[str, AttributeValue]:
        found = _attributes(topic, partition, operation, self._client_id)
        if self._group is not None:
            found["messaging.consumer.group.name"] = self._group
        if count is not None:
            found["messaging.batch.message_count"] = count
        return found

    def received(self, batch: RecordBatch) -> None:
        """Records, if there is an SDK, that a portion of a partition was handed to the application: a span without
        duration, with links to the creation contexts of the records."""
        if (found := tracer()) is None:
            return
        attributes = self._attributes(batch.topic, batch.partition, "receive", len(batch))
        span = found.start_span(f"receive {batch.topic}", kind=trace.SpanKind.CLIENT, attributes=attributes)
        if span.is_recording():
            for context in _creation_contexts(batch.headers):
                span.add_link(context)
        span.end()

    @contextmanager
    def processing(self, records: Record | RecordBatch) -> Iterator[trace.Span]:
        """Makes a `process` span current while the application works on a record, or on a batch of one partition.

        The span links to the creation contexts. Its parent is the application's current span; without a current span,
        for a single record, the record's creation context, so that sending and processing are one trace. Exceptions of
        the block are recorded and propagate.
        """
        if (found := tracer()) is None:
            yield trace.INVALID_SPAN
            return
        context: Context | None = None
        if isinstance(records, Record):
            creation = trace.get_current_span(records.trace_context).get_span_context()
            creations = [creation] if creation.is_valid else []
            if not trace.get_current_span().get_span_context().is_valid:
                context = records.trace_context
            count, offset = None, records.offset
        else:
            creations = _creation_contexts(records.headers)
            count, offset = len(records), int(records.offsets[0])
        span = found.start_span(
            f"process {records.topic}",
            context,
            trace.SpanKind.CONSUMER,
            attributes=self._attributes(records.topic, records.partition, "process", count)
            | {"messaging.streamhouse.offset": offset},
            links=[trace.Link(creation) for creation in creations],
        )
        # Recorded by `_failed`, with error.type; `use_span` would record the exception a second time.
        with trace.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
            try:
                yield span
            except Exception as error:
                _failed(span, error)
                raise


def _attributes(topic: str, partition: int, operation: str, client_id: str) -> dict[str, AttributeValue]:
    found: dict[str, AttributeValue] = {
        "messaging.system": "streamhouse",
        "messaging.destination.name": topic,
        "messaging.destination.partition.id": str(partition),
        "messaging.operation.name": operation,
        "messaging.operation.type": operation,
    }
    if client_id:
        found["messaging.client.id"] = client_id
    return found


def _failed(span: trace.Span, error: Exception) -> None:
    """Records an error by OpenTelemetry's conventions; `error.type` is the error's stable reason, else its class."""
    if span.is_recording():
        span.set_attribute("error.type", getattr(error, "reason", "") or type(error).__name__)
        span.record_exception(error)
        span.set_status(trace.StatusCode.ERROR, str(error))
