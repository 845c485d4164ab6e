"""Continuous queries: creates, pauses and drops them, and lets workers hold them.

Owns: leases, journal and checkpoints of jobs. Does not own: what is in an entry or a checkpoint, which the workers
encode.
Invariants: a job has a lease from its creation on. Holder and epoch change under the SQL lock; journal and checkpoint
under the lease's row lock, for its holder alone, so that a worker that was replaced changes nothing. The journal has
every micro-batch behind the checkpoint, without a gap.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shproto.errors import InvalidArgument, StreamHouseError
from shproto.events import SqlJobCreated

from streamhouse_coordinator.core import reach, sql_jobs
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.projection import Put, Remove, RowOp, Set
from streamhouse_coordinator.ports import Above, In, Transaction, where
from streamhouse_coordinator.service.common import Context, live_session, topic_named
from streamhouse_coordinator.service.sql_tables import SQL_LOCK

# Journals, checkpoints and texts of the jobs that a worker gets at a time. The rest of a message is for a single job
# that is larger, and for what journals grow by before their holders are replaced.
GRANTED_BYTES_MAX = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class JobView:
    """A job with its lease. `holder`: the session that holds it, None: none does now."""

    row: t.SqlJobRow
    lease: t.SqlJobLeaseRow
    holder: t.SessionRow | None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobGrant:
    """A job that a worker holds from now on, and where to go on."""

    view: JobView
    checkpoint: bytes
    journal: list[t.SqlJournalRow]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Report of the holder of a job: how far it has come."""

    lag_records: int
    watermark_us: int | None
    state_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimedJobs:
    """Answer to a worker. `stop`: (job id, epoch, why)."""

    granted: list[JobGrant]
    stop: list[tuple[str, int, str]]


async def create_sql_job(
    context: Context, job: str, kind: str, statement: str, output_topic: str, definitions: tuple[str, ...]
) -> JobView:
    """Creates a job, which a worker takes up with its next tick; returns the job. Raises InvalidArgument, UnknownTopic,
    JobExists, TableExists, Overloaded."""
    sql_jobs.check_create(job, kind, statement, output_topic, definitions)
    job_id = context.new_id().replace("-", "")
    # Allocated outside of the transaction, as for producers: an id that is not used after all costs nothing.
    producer_id = await context.store.next_producer_id()

    async def work(tx: Transaction) -> JobView:
        topic = await topic_named(tx, output_topic, lock="share")
        same_name = await tx.select(t.SQL_JOBS, where(job=job))
        is_table = bool(await tx.select(t.SQL_TABLES, where(table_name=job)))
        count = (await tx.totals(t.SQL_JOBS, where()))[0].count
        asked = SqlJobCreated(
            job_id=job_id,
            job=job,
            kind=kind,
            statement=statement,
            output_topic=output_topic,
            output_topic_id=topic.topic_id,
            producer_id=producer_id,
            created_ms=await tx.now_ms(),
            definitions=definitions,
        )
        await tx.append([sql_jobs.create(asked, same_name, is_table, count, context.settings.sql_jobs_max)])
        await tx.apply([Put(t.SQL_JOB_LEASES, t.SqlJobLeaseRow(job_id=job_id, session_id="", epoch=0))])
        return await _view(tx, job)

    return await context.store.run(work, lock=SQL_LOCK)


async def list_sql_jobs(context: Context, job: str = "") -> list[JobView]:
    """Returns the job of a name with its definitions, if there is one; without a name all jobs, by name, as a list
    shows them."""

    async def work(tx: Transaction) -> list[JobView]:
        if job:
            return await _views(tx, await tx.select(t.SQL_JOBS, where(job=job)))
        return await _views(tx, sql_jobs.listed(await tx.select(t.SQL_JOBS, order=("job",))))

    return await context.store.run(work)


async def alter_sql_job(context: Context, job: str, state: str) -> JobView:
    """Pauses a job, or resumes one that is paused or has failed; returns the job. Its holder is fenced at once. Raises
    UnknownJob, InvalidArgument."""

    async def work(tx: Transaction) -> JobView:
        row = sql_jobs.the_job(job, await tx.select(t.SQL_JOBS, where(job=job)))
        event = sql_jobs.alter(row, state, await tx.now_ms())
        if event is not None:
            await _release(tx, [row.job_id])
            await tx.append([event])
        return await _view(tx, job)

    return await context.store.run(work, lock=SQL_LOCK)


async def drop_sql_job(context: Context, job: str) -> str:
    """Drops a job with its journal and checkpoint; returns its id. Raises UnknownJob."""

    async def work(tx: Transaction) -> str:
        row = sql_jobs.the_job(job, await tx.select(t.SQL_JOBS, where(job=job)))
        await tx.select(t.SQL_JOB_LEASES, where(job_id=row.job_id), lock="wait")
        state = (t.SQL_JOB_LEASES, t.SQL_JOURNAL, t.SQL_CHECKPOINTS)
        await tx.apply([Remove(table, {"job_id": row.job_id}) for table in state])
        await tx.append([sql_jobs.drop(row, await tx.now_ms())])
        return row.job_id

    return await context.store.run(work, lock=SQL_LOCK)


# ---- workers


async def claim_sql_jobs(
    context: Context,
    session_id: str,
    held: Mapping[str, int],
    progress: Mapping[str, Progress],
    released: Mapping[str, int],
    ended: Mapping[str, int],
    is_leaving: bool,
) -> ClaimedJobs:
    """Gives a worker its share of the jobs that no live worker holds. Returns those, and the jobs that it has to stop.
    `held`, `released`, `ended`: epochs by job id, the last of runs that ended with an error; `progress` by job id, of
    held ones. Raises SessionExpired, InvalidArgument."""

    async def work(tx: Transaction) -> ClaimedJobs:
        session = await live_session(tx, session_id)
        if session.role != reach.SQL:
            text = f"session {session_id} is of role {session.role}; only role {reach.SQL} runs jobs"
            raise InvalidArgument(text, field="session_token", value=session.role, limit=reach.SQL)
        jobs = await tx.select(t.SQL_JOBS, order=("created_ms", "job"))
        # Only the holder of the SQL lock changes holders and epochs; journals grow meanwhile, and are read below.
        leases = {row.job_id: row for row in await tx.select(t.SQL_JOB_LEASES)}
        sizes = await tx.totals(t.SQL_CHECKPOINTS, where(), by=("job_id",), sums=("checkpoint",))
        gone = [key for key, epoch in released.items() if sql_jobs.is_holder(leases.get(key), session_id, epoch)]
        claims = sql_jobs.claims(
            session_id,
            held,
            await _live_workers(tx),
            [] if is_leaving else [row for row in jobs if row.job_id in leases and row.job_id not in gone],
            leases,
            {size.group[0]: size.sums[0] for size in sizes},
            bytes_max=GRANTED_BYTES_MAX,
        )
        errors = [key for key, epoch in ended.items() if sql_jobs.is_holder(leases.get(key), session_id, epoch)]
        reported = [key for key in progress if sql_jobs.is_holder(leases.get(key), session_id, held.get(key, 0))]
        granted = [row.job_id for row in claims.granted]
        if changed := {*gone, *errors, *granted, *reported}:
            await tx.select(t.SQL_JOB_LEASES, where(job_id=In(sorted(changed))), lock="wait")
        now_ms = await tx.now_ms()
        ops: list[RowOp] = [Set(t.SQL_JOB_LEASES, (key,), {"session_id": ""}) for key in sorted(gone)]
        ops += [Set(t.SQL_JOB_LEASES, (key,), {"ended_epoch": ended[key]}) for key in sorted(errors)]
        ops += [
            Set(t.SQL_JOB_LEASES, (row.job_id,), {"session_id": session_id, "epoch": row.epoch})
            for row in sorted(claims.granted, key=lambda row: row.job_id)
        ]
        ops += [_report(key, progress[key], now_ms) for key in sorted(reported)]
        await tx.apply(ops)
        views = await _views(tx, [row for row in jobs if row.job_id in granted])
        stop = [] if is_leaving else claims.stop
        return ClaimedJobs(granted=[await _grant(tx, view) for view in views], stop=stop)

    return await context.store.run(work, lock=SQL_LOCK)


async def append_sql_journal(
    context: Context, session_id: str, asked: Sequence[sql_jobs.AskedEntry]
) -> dict[str, StreamHouseError]:
    """Notes the boundaries of the jobs' next micro-batches, at most one of a job; asking again changes nothing. Returns
    why entries are refused, by job id: Fenced, InvalidArgument, Overloaded."""
    by_job = {entry.job_id: entry for entry in asked}
    if len(by_job) < len(asked):
        raise InvalidArgument(
            f"{len(asked)} entries of {len(by_job)} jobs: at most one of a job", field="entries", value=len(asked)
        )

    async def work(tx: Transaction) -> dict[str, StreamHouseError]:
        rows = await tx.select(t.SQL_JOB_LEASES, where(job_id=In(sorted(by_job))), lock="wait")
        leases = {row.job_id: row for row in rows}
        refused: dict[str, StreamHouseError] = {}
        ops: list[RowOp] = []
        for job_id, entry in sorted(by_job.items()):
            lease = leases.get(job_id)
            error = sql_jobs.check_entry(entry, lease, session_id)
            if error is None and lease is not None and entry.number == lease.journal_number:
                error = await _check_repeated(tx, entry)
            elif error is None and lease is not None:
                ops += [Put(t.SQL_JOB_LEASES, sql_jobs.append(lease, entry)), Put(t.SQL_JOURNAL, _journal_row(entry))]
            if error is not None:
                refused[job_id] = error
        await tx.apply(ops)
        return refused

    return await context.store.run(work) if by_job else {}


async def store_sql_checkpoint(
    context: Context, session_id: str, job_id: str, epoch: int, number: int, checkpoint: bytes
) -> None:
    """Stores a checkpoint that covers the micro-batches up to `number`, and forgets them. Raises Fenced,
    InvalidArgument."""

    async def work(tx: Transaction) -> None:
        lease = await _hold(tx, job_id, session_id, epoch)
        sql_jobs.check_checkpoint(lease, number, checkpoint)
        row = t.SqlCheckpointRow(job_id=job_id, number=number, epoch=epoch, checkpoint=checkpoint)
        covered = range(lease.checkpoint_number + 1, number + 1)
        await tx.apply(
            [
                Put(t.SQL_CHECKPOINTS, row),
                *(Remove(t.SQL_JOURNAL, {"job_id": job_id, "number": entry}) for entry in covered),
            ]
        )
        left = (await tx.totals(t.SQL_JOURNAL, where(job_id=job_id), sums=("entry",)))[0].sums[0]
        await tx.apply([Set(t.SQL_JOB_LEASES, (job_id,), {"checkpoint_number": number, "journal_bytes": left})])

    await context.store.run(work)


async def fail_sql_job(context: Context, session_id: str, job_id: str, epoch: int, reason: str) -> None:
    """Stops a job that cannot go on, until an operator resumes it. Raises Fenced."""

    async def work(tx: Transaction) -> None:
        await _hold(tx, job_id, session_id, epoch)
        await tx.apply([Set(t.SQL_JOB_LEASES, (job_id,), {"session_id": ""})])
        now_ms = await tx.now_ms()
        rows = await tx.select(t.SQL_JOBS, where(job_id=job_id))
        await tx.append([sql_jobs.fail(row, reason, now_ms) for row in rows])

    await context.store.run(work, lock=SQL_LOCK)


# ---- rows


async def _hold(tx: Transaction, job_id: str, session_id: str, epoch: int) -> t.SqlJobLeaseRow:
    """Locks the job's lease and returns it. Raises Fenced unless the session holds it under the epoch."""
    rows = await tx.select(t.SQL_JOB_LEASES, where(job_id=job_id), lock="wait")
    return sql_jobs.check_holder(job_id, rows[0] if rows else None, session_id, epoch)


async def _release(tx: Transaction, job_ids: Sequence[str]) -> None:
    """Takes jobs from their holders; the epochs stay, so that those of the next holders are higher."""
    rows = await tx.select(t.SQL_JOB_LEASES, where(job_id=In(job_ids)), order=("job_id",), lock="wait")
    await tx.apply([Set(t.SQL_JOB_LEASES, (row.job_id,), {"session_id": "", "ended_epoch": row.epoch}) for row in rows])


async def _live_workers(tx: Transaction) -> set[str]:
    # By leases, not sessions: a job must not wait until a sweep has ended the session of a dead worker.
    live = {row.session_id for row in await tx.select(t.SESSION_LEASES, where(expires_ms=Above(await tx.now_ms())))}
    return {row.session_id for row in await tx.select(t.SESSIONS, where(role=reach.SQL)) if row.session_id in live}


async def _check_repeated(tx: Transaction, asked: sql_jobs.AskedEntry) -> StreamHouseError | None:
    rows = await tx.select(t.SQL_JOURNAL, where(job_id=asked.job_id, number=asked.number))
    return sql_jobs.check_same(asked, (rows[0].epoch, rows[0].entry) if rows else None)


def _journal_row(asked: sql_jobs.AskedEntry) -> t.SqlJournalRow:
    return t.SqlJournalRow(job_id=asked.job_id, number=asked.number, epoch=asked.epoch, entry=asked.entry)


def _report(job_id: str, progress: Progress, now_ms: int) -> Set:
    return Set(
        t.SQL_JOB_LEASES,
        (job_id,),
        {
            "lag_records": progress.lag_records,
            "watermark_us": progress.watermark_us,
            "state_bytes": progress.state_bytes,
            "reported_ms": now_ms,
        },
    )


async def _grant(tx: Transaction, view: JobView) -> JobGrant:
    job_id = view.row.job_id
    checkpoint = await tx.select(t.SQL_CHECKPOINTS, where(job_id=job_id))
    return JobGrant(
        view=view,
        checkpoint=checkpoint[0].checkpoint if checkpoint else b"",
        journal=await tx.select(t.SQL_JOURNAL, where(job_id=job_id), order=("number",)),
    )


async def _view(tx: Transaction, job: str) -> JobView:
    return (await _views(tx, await tx.select(t.SQL_JOBS, where(job=job))))[0]


async def _views(tx: Transaction, rows: Sequence[t.SqlJobRow]) -> list[JobView]:
    if not rows:
        return []
    of_rows = where(job_id=In([row.job_id for row in rows]))
    leases = {row.job_id: row for row in await tx.select(t.SQL_JOB_LEASES, of_rows)}
    workers = await _live_workers(tx) if leases else set()
    sessions = {row.session_id: row for row in await tx.select(t.SESSIONS, where(role=reach.SQL))}
    views = []
    for row in rows:
        # Without a lease after a restore: the job is lost.
        lease = leases.get(row.job_id, t.SqlJobLeaseRow(job_id=row.job_id, session_id="", epoch=0))
        holder = sessions.get(lease.session_id) if lease.session_id in workers else None
        views.append(JobView(row=row, lease=lease, holder=holder))
    return views
