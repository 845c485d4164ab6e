"""Metrics of the agent; instruments cost next to nothing until the process installs an OpenTelemetry SDK."""

from collections.abc import Callable, Iterable

from opentelemetry import metrics
from opentelemetry.metrics import CallbackOptions, Observation
from shproto import errors
from shruntime.counters import TopicCounter
from shruntime.counters import counter as counter_from_start

REFUSALS = (
    errors.InvalidArgument,
    errors.InvalidBatch,
    errors.BatchTooLarge,
    errors.AcksTooWeak,
    errors.UnknownTopic,
    errors.UnknownPartition,
    errors.NotLeader,
    errors.SequenceGap,
    errors.ProducerFenced,
    errors.UnknownProducer,
    errors.Overloaded,
    errors.DiskFull,
    errors.Unavailable,
    errors.DurableTimeout,
    errors.ShuttingDown,
    errors.DataLoss,
    errors.Internal,
)
"""Errors that refuse a produce request, as listed in docs/errors.md; their reasons label the metric."""


class IngestMetrics:
    """Instruments of an agent. Names are streamhouse_ingest_<quantity>_<unit>, in full so that a search finds them."""

    def __init__(self, topics_max: int) -> None:
        meter = metrics.get_meter("streamhouse.ingest")

        def counter(name: str, description: str) -> metrics.Counter:
            return counter_from_start(meter, name, description)

        def histogram(name: str, description: str) -> metrics.Histogram:
            return meter.create_histogram(name, description=description)

        self._meter = meter
        self.records = counter("streamhouse_ingest_records_total", "records written to the log")
        self.bytes = counter("streamhouse_ingest_bytes_total", "batch bytes written to the log")
        self.topic_records = TopicCounter(
            meter, "streamhouse_ingest_topic_records_total", "records written to the log, by topic", topics_max
        )
        self.topic_bytes = TopicCounter(
            meter, "streamhouse_ingest_topic_bytes_total", "batch bytes written to the log, by topic", topics_max
        )
        self.duplicates = counter("streamhouse_ingest_duplicates_total", "retries of idempotent producers recognised")
        # From 0 for each reason: without the series the first refusal would be no increase for an alert.
        self.rejected = counter_from_start(
            meter,
            "streamhouse_ingest_rejected_total",
            "requests refused, by reason",
            label="reason",
            values=[refusal.reason for refusal in REFUSALS],
        )
        self.damaged = counter("streamhouse_ingest_damaged_spans_total", "damaged spans found in the log")
        self.lost_records = counter("streamhouse_ingest_lost_records_total", "records reported lost")
        self.possibly_lost = counter(
            "streamhouse_ingest_possibly_lost_ranges_total", "ranges whose end damage of the log hides"
        )
        self.fenced_records = counter(
            "streamhouse_ingest_fenced_records_total",
            "records dropped: their range was settled below them, or declared lost",
        )
        self.sealed = counter("streamhouse_ingest_sealed_buffers_total", "sealed buffers announced")
        self.append_ms = histogram("streamhouse_ingest_append_ms", "from queueing a batch until the log has it")
        self.write_ms = histogram("streamhouse_ingest_wal_write_ms", "write and fsync of a group")
        self.group_bytes = histogram("streamhouse_ingest_group_bytes", "bytes of a group")

    def observe(self, name: str, description: str, value: Callable[[], int | None]) -> None:
        """Creates a gauge that calls `value` whenever metrics are collected, and reports nothing if that is None."""

        def callback(_: CallbackOptions) -> Iterable[Observation]:
            found = value()
            return [] if found is None else [Observation(found)]

        self._meter.create_observable_gauge(name, [callback], description=description)
