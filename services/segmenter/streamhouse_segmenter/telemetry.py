"""Spans and metrics of the segmenter; no-ops until the process installs an SDK."""

from opentelemetry import metrics, trace

tracer = trace.get_tracer("streamhouse.segmenter")
_meter = metrics.get_meter("streamhouse.segmenter")

# outcome: registered | failed | claim_lost
buffers = _meter.create_counter("streamhouse_segmenter_buffers", description="claimed buffers, by outcome")
# result: registered | covered | fenced | early | withdrawn
registrations = _meter.create_counter("streamhouse_segmenter_registrations", description="answers, by result")
# why: mismatch | format | store | refused | peer | early | withdrawn | compaction | deletion | defect
failures = _meter.create_counter(
    "streamhouse_segmenter_failures", description="work that failed and is tried again later, by reason"
)
pulled_bytes = _meter.create_counter("streamhouse_segmenter_pulled_bytes", description="batches pulled from agents")
uploaded_bytes = _meter.create_counter("streamhouse_segmenter_uploaded_bytes", description="bytes of new objects")
raw_bytes = _meter.create_counter("streamhouse_segmenter_raw_bytes", description="bytes of new segments, uncompressed")
records = _meter.create_counter("streamhouse_segmenter_records", description="records in new segments")
builds_in_flight = _meter.create_up_down_counter(
    "streamhouse_segmenter_builds_in_flight", description="buffers being pulled, built and uploaded"
)
build_ms = _meter.create_histogram("streamhouse_segmenter_build_ms", description="pull and build of one object")
upload_ms = _meter.create_histogram("streamhouse_segmenter_upload_ms", description="upload of one object")
handover_ms = _meter.create_histogram("streamhouse_segmenter_handover_ms", description="claim to registered")
compacted_segments = _meter.create_counter(
    "streamhouse_segmenter_compacted_segments", description="small segments replaced by larger ones"
)
retired_segments = _meter.create_counter("streamhouse_segmenter_retired_segments", description="removed by retention")
retired_bytes = _meter.create_counter("streamhouse_segmenter_retired_bytes", description="removed by retention")
orphans_deleted = _meter.create_counter("streamhouse_segmenter_orphans_deleted", description="objects deleted")
orphan_deleted_bytes = _meter.create_counter("streamhouse_segmenter_orphan_deleted_bytes", description="of them")
orphans_waiting = _meter.create_gauge(
    "streamhouse_segmenter_orphans_waiting", description="unreferenced objects that the last sweep left for a later one"
)
# why: in_upload | referenced
deletions_refused = _meter.create_counter(
    "streamhouse_segmenter_deletions_refused", description="objects the coordinator did not give free, by reason"
)
sweeps_refused = _meter.create_counter(
    "streamhouse_segmenter_sweeps_refused",
    description="sweeps not done because the metadata went back in time, or its mark cannot be read",
)
events = _meter.create_counter("streamhouse_segmenter_events", description="BufferSealed notices that woke the worker")
