"""Counters of reads: plain integers on the hot path; telemetry reads them on export."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from functools import partial

from opentelemetry import metrics, trace

tracer = trace.get_tracer("streamhouse.query")
meter = metrics.get_meter("streamhouse.query")

fetch_duration_ms = meter.create_histogram(
    "streamhouse_query_fetch_duration_ms", description="time of one Fetch, long polls included"
)
delivery_duration_ms = meter.create_histogram(
    "streamhouse_query_delivery_duration_ms",
    description="from the records being there and asked for until they were given to a subscriber's stream",
)
download_duration_ms = meter.create_histogram(
    "streamhouse_query_download_duration_ms", description="time of one ranged GET from the object store"
)


_GAUGES = {
    "streamhouse_query_cache_bytes": "bytes in the disk cache",
    "streamhouse_query_cache_bytes_max": "limit of it",
    "streamhouse_query_cache_disk_free_bytes": "bytes left on the disk of the cache",
    "streamhouse_query_index_segments": "segments in the index",
    "streamhouse_query_feed_position": "position of the last event applied to the index",
}


def _counter(description: str) -> int:
    """Returns a field that starts at 0, with the description of its metric."""
    return field(default=0, metadata={"description": description})


@dataclass(slots=True, kw_only=True)
class Counters:
    """Counts since the start of the process. Each is also a metric, `streamhouse_query_<name>`."""

    cache_hits: int = _counter("chunks found in the disk cache")
    cache_misses: int = _counter("chunks not found in the disk cache")
    cache_write_errors: int = _counter("chunks that could not be written to the disk cache")
    cache_damaged_chunks: int = _counter("cached chunks whose bytes were damaged, fetched again")
    downloads: int = _counter("ranged GETs to the object store")
    download_bytes: int = _counter("bytes got from the object store")
    shared_hits: int = _counter("chunks found in the shared cache (Redis)")
    shared_misses: int = _counter("chunks not found in the shared cache")
    shared_errors: int = _counter("calls the shared cache did not answer")
    readahead_chunks: int = _counter("chunks fetched before they were asked for")
    fetches: int = _counter("fetches answered, subscriptions' included")
    fetched_bytes: int = _counter("batch bytes given to readers")
    tail_reads: int = _counter("reads of a leader's tail")
    tail_bytes: int = _counter("batch bytes read from leaders' tails")
    tail_errors: int = _counter("tail reads that failed")
    unsettled_waits: int = _counter("waits at a range whose end is not settled")
    damaged_spans: int = _counter("damaged or missing spans met by readers")
    snapshots: int = _counter("snapshots of the index taken")

    def snapshot_taken(self) -> None:
        """Counts a snapshot."""
        self.snapshots += 1


def export(counters: Counters, gauges: dict[str, Callable[[], int | None]]) -> None:
    """Registers every counter and gauge with telemetry; without the SDK this does nothing."""
    for item in fields(Counters):
        callback = _observe(partial(getattr, counters, item.name))
        description = item.metadata["description"]
        meter.create_observable_counter(f"streamhouse_query_{item.name}", [callback], description=description)
    for name, read in gauges.items():
        meter.create_observable_gauge(name, [_observe(read)], description=_GAUGES[name])


def _observe(
    read: Callable[[], int | None],
) -> Callable[[metrics.CallbackOptions], Iterable[metrics.Observation]]:
    def callback(_: metrics.CallbackOptions) -> Iterable[metrics.Observation]:
        found = read()
        return [] if found is None else [metrics.Observation(found)]

    return callback
