"""What the query service counts. Plain integers on the hot path; telemetry reads them when it is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from opentelemetry import metrics, trace

tracer = trace.get_tracer("streamhouse.query")
meter = metrics.get_meter("streamhouse.query")

fetch_duration_ms = meter.create_histogram(
    "streamhouse_query_fetch_duration_ms", "ms", "time of one Fetch, long polls included"
)
download_duration_ms = meter.create_histogram(
    "streamhouse_query_download_duration_ms", "ms", "time of one ranged GET from the object store"
)


@dataclass(slots=True)
class Counters:
    """Since the start of the service. Each is also a metric, `streamhouse_query_<name>`."""

    cache_hits: int = 0
    cache_misses: int = 0
    cache_write_errors: int = 0
    cache_damaged_chunks: int = 0
    downloads: int = 0
    download_bytes: int = 0
    shared_hits: int = 0
    shared_misses: int = 0
    shared_errors: int = 0
    readahead_chunks: int = 0
    fetches: int = 0
    fetched_bytes: int = 0
    tail_reads: int = 0
    tail_bytes: int = 0
    tail_errors: int = 0
    unsettled_waits: int = 0
    damaged_spans: int = 0
    snapshots: int = 0


def export(counters: Counters, gauges: dict[str, Callable[[], int]]) -> None:
    """Registers every counter and gauge with telemetry; without the SDK this does nothing."""
    for name in Counters.__slots__:
        meter.create_observable_counter(f"streamhouse_query_{name}", [_observe(partial(getattr, counters, name))])
    for name, read in gauges.items():
        meter.create_observable_gauge(f"streamhouse_query_{name}", [_observe(read)])


def _observe(
    read: Callable[[], int],
) -> Callable[[metrics.CallbackOptions], Iterable[metrics.Observation]]:
    return lambda _: [metrics.Observation(read())]
