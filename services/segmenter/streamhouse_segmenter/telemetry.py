"""Spans and metrics of the segmenter; no-ops until the process installs an SDK."""

from opentelemetry import metrics, trace
from shruntime.counters import counter, up_down_counter

tracer = trace.get_tracer("streamhouse.segmenter")
_meter = metrics.get_meter("streamhouse.segmenter")

buffers = counter(
    _meter,
    "streamhouse_segmenter_buffers",
    "claimed buffers, by outcome",
    "outcome",
    ("registered", "failed", "claim_lost"),
)
registrations = counter(
    _meter,
    "streamhouse_segmenter_registrations",
    "answers, by result",
    "result",
    ("registered", "covered", "fenced", "early", "withdrawn"),
)
failures = counter(
    _meter,
    "streamhouse_segmenter_failures",
    "work that failed and is tried again later, by reason",
    "reason",
    ("mismatch", "format", "store", "refused", "peer", "early", "withdrawn", "compaction", "deletion", "defect"),
)
pulled_bytes = counter(_meter, "streamhouse_segmenter_pulled_bytes", "batches pulled from agents")
uploaded_bytes = counter(_meter, "streamhouse_segmenter_uploaded_bytes", "bytes of new objects")
raw_bytes = counter(_meter, "streamhouse_segmenter_raw_bytes", "bytes of new segments, uncompressed")
records = counter(_meter, "streamhouse_segmenter_records", "records in new segments")
builds_in_flight = up_down_counter(
    _meter, "streamhouse_segmenter_builds_in_flight", "buffers being pulled, built and uploaded"
)
build_ms = _meter.create_histogram("streamhouse_segmenter_build_ms", description="pull and build of one object")
upload_ms = _meter.create_histogram("streamhouse_segmenter_upload_ms", description="upload of one object")
handover_ms = _meter.create_histogram("streamhouse_segmenter_handover_ms", description="claim to registered")
compacted_segments = counter(
    _meter, "streamhouse_segmenter_compacted_segments", "small segments replaced by larger ones"
)
retired_segments = counter(_meter, "streamhouse_segmenter_retired_segments", "removed by retention")
retired_bytes = counter(_meter, "streamhouse_segmenter_retired_bytes", "removed by retention")
orphans_deleted = counter(_meter, "streamhouse_segmenter_orphans_deleted", "objects deleted")
orphan_deleted_bytes = counter(_meter, "streamhouse_segmenter_orphan_deleted_bytes", "of them")
orphans_waiting = _meter.create_gauge(
    "streamhouse_segmenter_orphans_waiting", description="unreferenced objects that the last sweep left for a later one"
)
deletions_refused = counter(
    _meter,
    "streamhouse_segmenter_deletions_refused",
    "objects the coordinator did not give free, by reason",
    "reason",
    ("in_upload", "referenced"),
)
sweeps_refused = counter(
    _meter,
    "streamhouse_segmenter_sweeps_refused",
    "sweeps not done because the metadata went back in time, or its mark cannot be read",
)
events = counter(_meter, "streamhouse_segmenter_events", "BufferSealed notices that woke the worker")
