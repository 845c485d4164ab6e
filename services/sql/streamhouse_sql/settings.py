"""Settings of the SQL service. Each has a unit, a range and a reason."""

import ipaddress
import tempfile
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field
from shread.settings import ReadSettings
from shruntime.memory import MIB, MemoryShare
from shruntime.settings import one_line


def _loopback_listen(listen: str) -> str:
    """Returns the address if it is empty, or of this machine itself. Raises ValueError."""
    if not listen:
        return listen
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65_535:
        raise ValueError("must be host:port, or empty")
    if host.lower() == "localhost":
        return listen
    try:
        is_loopback = ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise ValueError(
            "must be an address of this machine itself (127.0.0.1, ::1, localhost): PostgreSQL clients are neither "
            "authenticated nor encrypted yet; use an SSH tunnel to reach it from elsewhere"
        )
    return listen


class SqlSettings(ReadSettings):
    service: ClassVar[str] = "sql"

    agent_id: Annotated[str, AfterValidator(one_line)] = Field(
        "", max_length=128, description="name of this SQL service in `status`; empty: made from its address"
    )
    sql_memory_bytes_max: int = Field(
        default_factory=MemoryShare(part=8, least=64 * MIB, most=1024 * MIB),
        ge=16 * MIB,
        le=1 << 44,
        description="memory of one statement, beyond which it spills to sql_temp_dir",
    )
    sql_temp_dir: Path = Field(
        Path(tempfile.gettempdir()) / "streamhouse-sql",
        description="directory of the statements' spill files; a statement's files go with it",
    )
    sql_temp_bytes_max: int = Field(
        10 * 1024 * MIB, ge=0, le=1 << 50, description="bytes that one statement may spill to sql_temp_dir"
    )
    sql_threads: int = Field(
        2, ge=1, le=256, description="threads that compute one statement; more help joins and sorts on larger machines"
    )
    sql_timeout_ms: int = Field(
        300_000,
        ge=1,
        le=86_400_000,
        description="time after which a statement ends with STATEMENT_TIMEOUT; a client may ask for less",
    )
    sql_statements_max: int = Field(
        4, ge=1, le=1_000, description="statements that run at once; each may use sql_memory_bytes_max"
    )
    sql_statements_waiting_max: int = Field(
        100, ge=0, le=100_000, description="statements that wait for their turn; beyond, callers get OVERLOADED"
    )
    sql_live_statements_max: int = Field(
        4,
        ge=1,
        le=1_000,
        description="live queries (EMIT) that run at once, beside sql_statements_max, since they do not end by "
        "themselves; each may use sql_memory_bytes_max, and as much disk as another statement",
    )
    sql_live_timeout_ms: int = Field(
        0,
        ge=0,
        le=604_800_000,
        description="time after which a live query ends with STATEMENT_TIMEOUT, for clients that nobody looks at any "
        "more; a client may ask for less. 0: none",
    )
    sql_statement_bytes_max: int = Field(
        256 * 1024, ge=1, le=1 * MIB, description="length of a statement's text, which takes a parser in Python"
    )
    sql_result_rows_max: int = Field(
        1_000_000_000, ge=1, le=1 << 60, description="rows of a result, beyond which the statement is ended"
    )
    sql_result_bytes_max: int = Field(
        100 * 1024 * MIB, ge=1, le=1 << 60, description="bytes of a result (Arrow), beyond which the statement is ended"
    )
    sql_pg_listen: Annotated[str, AfterValidator(_loopback_listen)] = Field(
        "127.0.0.1:5433",
        description="where PostgreSQL's clients connect; port 0: any that is free; empty: nowhere. Only addresses of "
        "this machine itself, since these connections have neither passwords nor encryption yet",
    )
    sql_pg_connections_max: int = Field(
        100, ge=1, le=10_000, description="sessions of PostgreSQL clients at once; the next is told so and closed"
    )
    sql_pg_statements_max: int = Field(
        1_000, ge=1, le=1_000_000, description="prepared statements of a session, and as many portals"
    )
    sql_pg_message_bytes_max: int = Field(
        16 * MIB,
        ge=1024,
        le=1024 * MIB,
        description="a message of a PostgreSQL client, and all of a session's messages that wait",
    )
    sql_pg_startup_timeout_ms: int = Field(
        10_000, ge=1, le=3_600_000, description="time that a PostgreSQL client has to begin its session"
    )
    sql_pg_idle_timeout_ms: int = Field(
        3_600_000,
        ge=0,
        le=604_800_000,
        description="time without a message after which a PostgreSQL client's session is closed; 0: never",
    )
    sql_gather_ms: int = Field(
        50,
        ge=0,
        le=60_000,
        description="longest time for which a job gathers records of a micro-batch: each costs some ms of CPU whatever "
        "its size",
    )
    sql_gather_rows_max: int = Field(
        50_000, ge=1, le=10_000_000, description="records of a micro-batch; more save no CPU and delay the result"
    )
    sql_gather_bytes_max: int = Field(
        16 * MIB,
        ge=1,
        le=1 << 40,
        description="decoded bytes of a micro-batch; a job reads twice as many ahead",
    )
    sql_idle_after_ms: int = Field(
        5_000,
        ge=1,
        le=86_400_000,
        description="time without a record after which a partition holds the watermark back no longer; its next "
        "records may be late",
    )
    sql_checkpoint_interval_ms: int = Field(
        10_000,
        ge=1,
        le=3_600_000,
        description="time between two checkpoints of a job; a worker that takes it over repeats what came since",
    )
    sql_job_memory_bytes_max: int = Field(
        default_factory=MemoryShare(part=8, least=64 * MIB, most=1024 * MIB),
        ge=16 * MIB,
        le=1 << 44,
        description="memory of the state of one job, beyond which it spills to sql_temp_dir; no result of a "
        "micro-batch, and no table of the state, may be larger: a checkpoint has them in memory",
    )
    sql_job_temp_bytes_max: int = Field(
        10 * 1024 * MIB, ge=0, le=1 << 50, description="bytes that the state of one job may spill to sql_temp_dir"
    )
    sql_job_output_bytes_max: int = Field(
        32 * MIB,
        ge=1,
        le=1 << 40,
        description="output of a job that is not acknowledged yet, beyond which the job computes nothing new",
    )
    sql_job_step_timeout_ms: int = Field(
        60_000, ge=1, le=86_400_000, description="time of a micro-batch, after which it is interrupted and has failed"
    )
    sql_job_attempts_max: int = Field(
        3, ge=1, le=1_000, description="failures at the same micro-batch after which a job is stopped as failed"
    )
    sql_job_threads: int = Field(
        2, ge=1, le=256, description="threads that run micro-batches, each of one job at a time: one per core"
    )
    sql_job_tick_ms: int = Field(
        1_000,
        ge=10,
        le=60_000,
        description="time between two questions of a worker which jobs are its own; a new job waits so long at most",
    )
    sql_job_stop_ms: int = Field(
        10_000,
        ge=0,
        le=600_000,
        description="time in which a worker that stops stores checkpoints of its jobs; the next worker then repeats "
        "nothing",
    )
    sql_require_bounded_state: bool = Field(
        False,
        description="refuse continuous queries whose state nothing bounds but the number of distinct keys; without it "
        "CREATE warns",
    )
    sql_view_stale_ms_max: int = Field(
        10_000,
        ge=100,
        le=3_600_000,
        description="time without an answer of a coordinator after which a worker answers no query of a view: another "
        "may have taken the job over",
    )
    sql_read_wait_ms: int = Field(
        10_000,
        ge=0,
        le=3_600_000,
        description="wait for records that exist and cannot be read at the moment (an agent restarts, a range is "
        "unsettled), before the statement ends with UNAVAILABLE and the reason",
    )
