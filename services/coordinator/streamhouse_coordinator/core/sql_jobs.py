"""Decides on continuous queries: who holds a job, and what its holder may write. Pure.

The coordinator neither reads statements nor what workers note of micro-batches and checkpoints: it fences. A job is
held by one session under an epoch that grows with every holder; what an older holder asks for is refused.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from shproto.errors import (
    Fenced,
    InvalidArgument,
    JobExists,
    Overloaded,
    StreamHouseError,
    TableExists,
    UnknownJob,
)
from shproto.events import SqlJobAltered, SqlJobCreated, SqlJobDropped

from streamhouse_coordinator.core.names import check_text, check_topic
from streamhouse_coordinator.core.sql_tables import DEFINITION_CHARS_MAX, check_sql_name
from streamhouse_coordinator.core.tables import VIEW, SqlJobLeaseRow, SqlJobRow

RUNNING, PAUSED, FAILED, LOST = "running", "paused", "failed", "lost"
KINDS = (VIEW, "sink", "insert")
# Reasons for which a worker stops a job, beside the states.
MOVING, DROPPED, TAKEN_OVER = "moving", "dropped", "taken_over"
# Boundaries of a micro-batch take some 30 bytes per partition with new records: 8,000 partitions.
ENTRY_BYTES_MAX = 256 * 1024
# The pointer of a checkpoint: positions and sequences per partition, and the names of its objects.
CHECKPOINT_BYTES_MAX = 1024 * 1024
# Micro-batches behind a checkpoint: a worker that cannot store checkpoints stops here. At 20 a second that is 8
# minutes, which the next worker has to repeat.
JOURNAL_ENTRIES_MAX = 10_000
# The next holder gets the journal in one message; a quarter of the largest.
JOURNAL_BYTES_MAX = 16 * 1024 * 1024
REASON_CHARS_MAX = 4_000
DEFINITIONS_MAX = 20
# Statement and definitions of a job: workers and coordinators read those of all jobs.
TEXTS_BYTES_MAX = 1024 * 1024
# Statements and reasons in a list of all jobs: half of a message. Names and numbers of 10,000 jobs fit into the rest.
LISTED_BYTES_MAX = 32 * 1024 * 1024
# What a message has around an entry of a journal: number, epoch, lengths.
_ENTRY_EXTRA_BYTES = 32
_JOB_EXTRA_BYTES = 2_000  # names, ids and numbers
RESTORED = (
    "the metadata was restored from a backup, which does not say how far the job has come: drop the job, and create it "
    "again with an output topic of its own"
)


def check_create(job: str, kind: str, statement: str, output_topic: str, definitions: Sequence[str]) -> None:
    """Checks a new job. Raises InvalidArgument that names the field, its limit and the value."""
    check_sql_name("job", job)
    if kind not in KINDS:
        raise InvalidArgument(
            f"kind is {kind[:300]!r}, must be {', '.join(KINDS)}", field="kind", value=kind[:300], limit=list(KINDS)
        )
    check_text("statement", statement, DEFINITION_CHARS_MAX)
    check_topic(output_topic)
    if len(definitions) > DEFINITIONS_MAX:
        raise InvalidArgument(
            f"definitions has {len(definitions)} tables, the limit is {DEFINITIONS_MAX}",
            field="definitions",
            value=len(definitions),
            limit=DEFINITIONS_MAX,
        )
    for definition in definitions:
        check_text("definitions", definition, DEFINITION_CHARS_MAX)
    size_bytes = _size_bytes(statement, *definitions)
    if size_bytes > TEXTS_BYTES_MAX:
        raise InvalidArgument(
            f"statement and definitions have {size_bytes} bytes together, the limit is {TEXTS_BYTES_MAX}",
            field="definitions",
            value=size_bytes,
            limit=TEXTS_BYTES_MAX,
        )


def create(
    asked: SqlJobCreated, same_name: Collection[SqlJobRow], is_table: bool, job_count: int, jobs_max: int
) -> SqlJobCreated:
    """Returns the event of a new job. `is_table`: a table has its name, which a view would hide. Raises JobExists,
    TableExists, or Overloaded if there are too many jobs."""
    if same_name:
        raise JobExists(f"job {asked.job!r} exists already", job=asked.job)
    if is_table and asked.kind == VIEW:
        raise TableExists(f"table {asked.job!r} exists already", table=asked.job)
    if job_count >= jobs_max:
        raise Overloaded(
            f"{job_count} jobs exist; the limit sql_jobs_max is {jobs_max}", limit=jobs_max, value=job_count
        )
    return asked


def the_job(job: str, rows: Sequence[SqlJobRow]) -> SqlJobRow:
    """Returns the only row. Raises UnknownJob."""
    if not rows:
        raise UnknownJob(f"there is no job {job!r}", job=job)
    return rows[0]


def alter(row: SqlJobRow, state: str, now_ms: int) -> SqlJobAltered | None:
    """Returns the event that pauses or resumes a job; None if it is in that state already. Raises InvalidArgument."""
    if state not in (RUNNING, PAUSED):
        raise InvalidArgument(
            f"state is {state[:300]!r}, must be {RUNNING} or {PAUSED}",
            field="state",
            value=state[:300],
            limit=[RUNNING, PAUSED],
        )
    if row.state == LOST:
        raise InvalidArgument(f"job {row.job!r} cannot go on: {row.reason}", field="state", value=state, limit=LOST)
    if row.state == state:
        return None
    return _altered(row, state, "", now_ms)


def fail(row: SqlJobRow, reason: str, now_ms: int) -> SqlJobAltered:
    """Returns the event of a job that its holder cannot run."""
    return _altered(row, FAILED, reason, now_ms)


def lose(row: SqlJobRow, now_ms: int) -> SqlJobAltered:
    """Returns the event of a job whose journal and checkpoint a restore has not brought back."""
    return _altered(row, LOST, RESTORED, now_ms)


def listed(rows: Sequence[SqlJobRow]) -> list[SqlJobRow]:
    """Returns jobs as a list shows them, so that all fit into a message: without definitions; long statements and
    reasons are cut if they are too many."""
    size_bytes = sum(_size_bytes(row.statement, row.reason) for row in rows)
    limit = None if size_bytes <= LISTED_BYTES_MAX else LISTED_BYTES_MAX // (2 * len(rows))
    return [
        replace(row, definitions="[]", statement=_cut(row.statement, limit), reason=_cut(row.reason, limit))
        for row in rows
    ]


def _cut(text: str, bytes_max: int | None) -> str:
    data = text.encode()
    if bytes_max is None or len(data) <= bytes_max:
        return text
    more = "…"
    return data[: bytes_max - len(more.encode())].decode(errors="ignore") + more


def _size_bytes(*texts: str) -> int:
    return sum(len(text.encode()) for text in texts)


def _altered(row: SqlJobRow, state: str, reason: str, now_ms: int) -> SqlJobAltered:
    return SqlJobAltered(
        job_id=row.job_id, job=row.job, state=state, reason=reason[:REASON_CHARS_MAX], altered_ms=now_ms
    )


def drop(row: SqlJobRow, now_ms: int) -> SqlJobDropped:
    """Returns the event of a dropped job."""
    return SqlJobDropped(row.job_id, row.job, now_ms)


# ---- holders


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """`granted`: new leases of the worker. `stop`: (job id, epoch, why) of jobs that it says it holds and must stop."""

    granted: list[SqlJobLeaseRow]
    stop: list[tuple[str, int, str]]


def claims(
    session_id: str,
    held: Mapping[str, int],
    workers: Collection[str],
    jobs: Sequence[SqlJobRow],
    leases: Mapping[str, SqlJobLeaseRow],
    checkpoint_bytes: Mapping[str, int],
    *,
    bytes_max: int,
) -> Claims:
    """Returns the jobs that a worker has to stop, and those that it gets: running ones without a live holder, up to its
    fair share, and up to `bytes_max` of what it is told of them but at least one job.

    `held`: epochs by id of the jobs that the worker runs. `workers`: sessions of all live workers, `session_id` among
    them; `leases` by job id, also of sessions that ended; `checkpoint_bytes`: sizes of checkpoints by job id.
    """
    running = [job for job in jobs if job.state == RUNNING]
    share = -(-len(running) // max(1, len(workers)))
    states = {job.job_id: job.state for job in jobs}
    stop: list[tuple[str, int, str]] = []
    mine: list[str] = []
    for job_id, epoch in sorted(held.items()):
        lease = leases.get(job_id)
        if job_id not in states:
            stop.append((job_id, epoch, DROPPED))
        elif states[job_id] != RUNNING:
            stop.append((job_id, epoch, states[job_id]))
        elif lease is None or lease.session_id != session_id or lease.epoch != epoch:
            stop.append((job_id, epoch, TAKEN_OVER))
        else:
            mine.append(job_id)
    stop += [(job_id, held[job_id], MOVING) for job_id in mine[share:]]
    granted: list[SqlJobLeaseRow] = []
    room_bytes = bytes_max
    for job in running:
        if len(mine) + len(granted) >= share:
            break
        lease = leases.get(job.job_id, SqlJobLeaseRow(job_id=job.job_id, session_id="", epoch=0))
        if job.job_id in mine or (lease.session_id in workers and lease.session_id != session_id):
            continue
        room_bytes -= _grant_bytes(job, lease) + checkpoint_bytes.get(job.job_id, 0)
        if granted and room_bytes < 0:
            break
        granted.append(replace(lease, session_id=session_id, epoch=lease.epoch + 1))
    return Claims(granted=granted, stop=stop)


def _grant_bytes(job: SqlJobRow, lease: SqlJobLeaseRow) -> int:
    """Returns the size of a grant without the checkpoint, rather too high than too low."""
    entries = lease.journal_number - lease.checkpoint_number
    texts_bytes = _size_bytes(job.statement, job.reason, job.definitions)
    return _JOB_EXTRA_BYTES + texts_bytes + lease.journal_bytes + entries * _ENTRY_EXTRA_BYTES


def is_holder(lease: SqlJobLeaseRow | None, session_id: str, epoch: int) -> bool:
    """True if the session holds the job under the epoch."""
    return lease is not None and lease.epoch == epoch and lease.session_id == session_id


def check_holder(job_id: str, lease: SqlJobLeaseRow | None, session_id: str, epoch: int) -> SqlJobLeaseRow:
    """Returns the lease. Raises Fenced unless the session holds the job under the epoch."""
    if lease is None or not is_holder(lease, session_id, epoch):
        held = "is gone" if lease is None else f"is in epoch {lease.epoch}"
        raise Fenced(f"job {job_id} {held}, not held by this worker in epoch {epoch}", epoch=epoch)
    return lease


# ---- journal and checkpoints


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedEntry:
    """An entry of the journal as the holder under `epoch` asks for it."""

    job_id: str
    epoch: int
    number: int
    entry: bytes


def check_entry(asked: AskedEntry, lease: SqlJobLeaseRow | None, session_id: str) -> StreamHouseError | None:
    """Returns why an entry is refused, None if it may be appended or is there already: then its number is the
    lease's."""
    try:
        lease = check_holder(asked.job_id, lease, session_id, asked.epoch)
        _check_size("entry", asked.entry, ENTRY_BYTES_MAX)
    except StreamHouseError as error:
        return error
    following = lease.journal_number + 1
    if asked.number == lease.journal_number and asked.number > lease.checkpoint_number:
        return None
    if asked.number != following:
        return InvalidArgument(
            f"number is {asked.number}, must be {following}", field="number", value=asked.number, limit=following
        )
    entries = lease.journal_number - lease.checkpoint_number
    if entries >= JOURNAL_ENTRIES_MAX or lease.journal_bytes + len(asked.entry) > JOURNAL_BYTES_MAX:
        return Overloaded(
            f"{entries} micro-batches of {lease.journal_bytes} bytes are not covered by a checkpoint; the limits are "
            f"{JOURNAL_ENTRIES_MAX} and {JOURNAL_BYTES_MAX} bytes",
            limit=JOURNAL_ENTRIES_MAX,
            value=entries,
        )
    return None


def check_same(asked: AskedEntry, there: tuple[int, bytes] | None) -> StreamHouseError | None:
    """Returns why an entry with the number of the last one is refused; None if it is the same one: the answer to the
    first try was lost. `there`: epoch and bytes of the last entry."""
    if there == (asked.epoch, asked.entry):
        return None
    return InvalidArgument(
        f"micro-batch {asked.number} is in the journal already, with other boundaries",
        field="number",
        value=asked.number,
        limit=asked.number + 1,
    )


def append(lease: SqlJobLeaseRow, asked: AskedEntry) -> SqlJobLeaseRow:
    """Returns the lease after the entry was appended."""
    return replace(lease, journal_number=asked.number, journal_bytes=lease.journal_bytes + len(asked.entry))


def check_checkpoint(lease: SqlJobLeaseRow, number: int, checkpoint: bytes) -> None:
    """Checks a checkpoint of the job's holder. Raises InvalidArgument: it covers no less than the last one, and nothing
    that the journal does not know."""
    _check_size("checkpoint", checkpoint, CHECKPOINT_BYTES_MAX)
    if not lease.checkpoint_number <= number <= lease.journal_number:
        limits = f"{lease.checkpoint_number}..{lease.journal_number}"
        raise InvalidArgument(
            f"number is {number}, must be in {limits}: from the last checkpoint to the last micro-batch",
            field="number",
            value=number,
            limit=limits,
        )


def _check_size(field: str, data: bytes, bytes_max: int) -> None:
    if len(data) > bytes_max:
        raise InvalidArgument(
            f"{field} has {len(data)} bytes, the limit is {bytes_max}", field=field, value=len(data), limit=bytes_max
        )
