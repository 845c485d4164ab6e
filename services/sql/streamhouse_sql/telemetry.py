"""Metrics of the SQL service; no-ops until the process installs an SDK."""

from collections.abc import Callable, Mapping

from opentelemetry import metrics
from shruntime.counters import counter, up_down_counter

_meter = metrics.get_meter("streamhouse.sql")

statements = counter(
    _meter,
    "streamhouse_sql_statements",
    "statements that ended, by outcome",
    "outcome",
    ("done", "failed", "cancelled"),
)
statements_running = up_down_counter(_meter, "streamhouse_sql_statements_running", "statements that hold a turn")
live_statements_running = up_down_counter(
    _meter, "streamhouse_sql_live_statements_running", "live queries (EMIT) that run"
)
live_rows = counter(_meter, "streamhouse_sql_live_rows", "changes that live queries computed for their clients")
pg_connections = up_down_counter(_meter, "streamhouse_sql_pg_connections", "sessions of PostgreSQL clients")
statement_duration_ms = _meter.create_histogram(
    "streamhouse_sql_statement_duration_ms", description="time of one statement, its wait for a turn included"
)
records_scanned = counter(_meter, "streamhouse_sql_records_scanned", "records decoded for statements")
bytes_scanned = counter(_meter, "streamhouse_sql_bytes_scanned", "encoded batches read for statements")


def export_jobs(gauges: Mapping[str, tuple[str, Callable[[], int]]]) -> None:
    """Registers gauges of jobs: (description, function of the value) by name."""

    def observed(read: Callable[[], int]) -> Callable[[metrics.CallbackOptions], list[metrics.Observation]]:
        return lambda _: [metrics.Observation(read())]

    for name, (description, read) in gauges.items():
        _meter.create_observable_gauge(name, [observed(read)], description=description)


job_steps = counter(_meter, "streamhouse_sql_job_steps", "micro-batches of jobs that were run")
job_rows_in = counter(_meter, "streamhouse_sql_job_rows_in", "records that jobs have read")
job_rows_out = counter(_meter, "streamhouse_sql_job_rows_out", "records that jobs have written")
job_late_rows = counter(_meter, "streamhouse_sql_job_late_rows", "rows that came behind the watermark")
job_bad_rows = counter(_meter, "streamhouse_sql_job_bad_rows", "records that do not fit their table and were left out")
job_checkpoints = counter(_meter, "streamhouse_sql_job_checkpoints", "checkpoints of jobs that were stored")
job_failures = counter(
    _meter,
    "streamhouse_sql_job_failures",
    "runs of jobs that ended with an error, by outcome: the job is tried again, or has failed",
    "outcome",
    ("tried_again", "failed"),
)
