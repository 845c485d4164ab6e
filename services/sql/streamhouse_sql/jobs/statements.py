"""Statements about jobs: creates, pauses, drops and shows them.

Owns: nothing; jobs are the coordinator's. Does not own: how a job runs.
Invariants: a job is created only if its statement plans, and with a topic that it may write. What a refused statement
has made, as the topic of a view, is taken back.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
from shproto.acks import ACKS_DURABLE
from shproto.errors import (
    InvalidStatement,
    JobExists,
    StreamHouseError,
    TopicExists,
    UnknownJob,
    UnknownTopic,
)
from shproto.services import CoordinatorApi
from shproto.v1 import coordinator_pb2 as pb

from streamhouse_sql.arrow import table_of
from streamhouse_sql.catalog import Catalog
from streamhouse_sql.core.continuous.model import JobPlan
from streamhouse_sql.core.continuous.statements import (
    AlterJob,
    ContinuousQuery,
    DropJob,
    ExplainContinuous,
    JobStatement,
    ShowJobs,
)
from streamhouse_sql.core.explain import explained_job
from streamhouse_sql.core.tables import TableDefinition
from streamhouse_sql.jobs.encode import KEY_COLUMNS, VALUE_COLUMNS, check_columns
from streamhouse_sql.settings import SqlSettings

PlanJob = Callable[[ContinuousQuery, Mapping[str, int], Mapping[str, TableDefinition]], JobPlan]

JOB_COLUMNS = (
    ("name", "VARCHAR", pa.string()),
    ("kind", "VARCHAR", pa.string()),
    ("state", "VARCHAR", pa.string()),
    ("topic", "VARCHAR", pa.string()),
    ("worker", "VARCHAR", pa.string()),
    ("epoch", "BIGINT", pa.int64()),
    ("micro_batches", "BIGINT", pa.int64()),
    ("checkpoint", "BIGINT", pa.int64()),
    ("lag_records", "BIGINT", pa.int64()),
    ("watermark", "TIMESTAMP WITH TIME ZONE", pa.timestamp("us", tz="UTC")),
    ("state_bytes", "BIGINT", pa.int64()),
    ("reason", "VARCHAR", pa.string()),
    ("statement", "VARCHAR", pa.string()),
)
_TAGS = {"view": "MATERIALIZED VIEW", "sink": "SINK", "insert": "JOB", "job": "JOB"}
_ACTIONS = {"pause": "paused", "resume": "running"}
_NO_LETTER = re.compile(r"[^a-z0-9_]+")


def tag_of(statement: JobStatement) -> str:
    """Returns the words that say what a statement has done, as PostgreSQL's command tags do."""
    match statement:
        case ContinuousQuery(kind="insert"):
            return "INSERT 0 0"
        case ContinuousQuery(kind=kind):
            return f"CREATE {_TAGS[kind]}"
        case DropJob(kind=kind):
            return f"DROP {_TAGS[kind]}"
        case AlterJob(kind=kind):
            return f"ALTER {_TAGS[kind]}"
    return "SHOW" if isinstance(statement, ShowJobs) else "EXPLAIN"


class JobStatements:
    """Runs statements about jobs. `plan` makes the program of a query, and blocks. `changed` is called once the jobs
    are others; `trouble` returns the reason for which a job of this process waits."""

    def __init__(
        self,
        coordinator: CoordinatorApi,
        catalog: Catalog,
        settings: SqlSettings,
        plan: PlanJob,
        changed: Callable[[], None],
        trouble: Callable[[str], str],
    ) -> None:
        self._coordinator = coordinator
        self._catalog = catalog
        self._settings = settings
        self._plan = plan
        self._changed = changed
        self._trouble = trouble

    async def run(self, statement: JobStatement) -> Any:
        """Returns the result as a `pyarrow.RecordBatch`. Raises InvalidStatement, JobExists, UnknownJob, UnknownTopic,
        TopicExists, Unavailable."""
        match statement:
            case ContinuousQuery():
                return _status([tag_of(statement), *await self._create(statement)])
            case ExplainContinuous(query):
                return table_of({"plan": await self._explain(query)}, {"plan": pa.string()})
            case DropJob():
                await self._drop(statement)
            case AlterJob():
                job = await self._find(statement.kind, statement.name)
                await self._coordinator.alter_sql_job(
                    pb.AlterSqlJobRequest(job=job.job, state=_ACTIONS[statement.action])
                )
            case ShowJobs(kind):
                return self._shown([job for job in await self._jobs() if kind in ("job", job.kind)])
        self._changed()
        return _status([tag_of(statement)])

    async def _jobs(self, job: str = "") -> Sequence[pb.SqlJobInfo]:
        """Returns all jobs, or the one of a name if there is one."""
        return (await self._coordinator.list_sql_jobs(pb.ListSqlJobsRequest(job=job))).jobs

    async def _find(self, kind: str, name: str) -> pb.SqlJobInfo:
        job = next((job for job in await self._jobs(name.lower()) if job.job == name.lower()), None)
        if job is None:
            raise UnknownJob(f"there is no {_TAGS[kind].lower()} {name!r}; SHOW JOBS lists all", job=name)
        if kind not in ("job", job.kind):
            tag = _TAGS[job.kind]
            raise InvalidStatement(f"{name} is a {tag.lower()}, so the statement has to say {tag}", clause=_TAGS[kind])
        return job

    # ---- create

    async def _create(self, query: ContinuousQuery) -> list[str]:
        """Creates a job. Returns its name for an INSERT, and warnings."""
        name = query.name.lower() or _name_of(query.target)
        jobs = await self._jobs()
        if any(job.job == name for job in jobs):
            if query.if_not_exists:
                return []
            raise JobExists(f"job {name!r} exists already", job=name)
        _check_inputs(query, jobs)
        plan, tables = await self._planned(query)
        topic = self._check_output(query, plan)
        created = None
        if query.kind == "view":
            created = await self._create_topic(query.name, plan)
        request = pb.CreateSqlJobRequest(
            job=name,
            kind=query.kind,
            statement=query.text,
            output_topic=topic,
            definitions=[table.text for table in tables],
        )
        try:
            await self._coordinator.create_sql_job(request)
        except StreamHouseError as error:
            if not await self._is_created(request, created, error):
                if isinstance(error, JobExists) and query.if_not_exists:
                    return []
                raise
        await self._catalog.refresh()
        self._changed()
        named = [f"job {name}"] if query.kind == "insert" else []
        return [*named, *(f"WARNING: {warning}" for warning in plan.warnings)]

    async def _is_created(
        self, request: pb.CreateSqlJobRequest, topic_id: bytes | None, error: StreamHouseError
    ) -> bool:
        """Returns True if the job is there in spite of the error: the answer to a first try was lost, and the call was
        repeated. Else takes the topic that was made for the job back, unless a job writes it or may do so."""
        if error.retriable:  # the job may be there
            return False
        if topic_id is None:
            # No other statement has the random name of an INSERT; another sink of the name may be somebody else's.
            return isinstance(error, JobExists) and request.kind == "insert"
        with contextlib.suppress(StreamHouseError):  # else the topic is left
            writers = [job for job in await self._jobs() if job.output_topic_id == topic_id]
            if not writers:
                await self._delete_topic(request.output_topic, topic_id)
            return any(job.job == request.job for job in writers)
        return False

    async def _delete_topic(self, topic: str, topic_id: bytes) -> None:
        """Deletes the topic, if it is still the one with the id."""
        with contextlib.suppress(UnknownTopic):
            found = await self._coordinator.describe_topic(pb.DescribeTopicRequest(topic=topic))
            if found.topic.topic_id == topic_id:
                await self._coordinator.delete_topic(pb.DeleteTopicRequest(topic=topic))

    async def _planned(self, query: ContinuousQuery) -> tuple[JobPlan, list[TableDefinition]]:
        """Returns the program, and the declared tables that the query names."""
        try:
            return await self._planned_once(query)
        except InvalidStatement:
            # The index may be a moment behind: a name that it does not know is asked for.
            await self._catalog.refresh()
            return await self._planned_once(query)

    async def _planned_once(self, query: ContinuousQuery) -> tuple[JobPlan, list[TableDefinition]]:
        declared = self._catalog.tables()
        tables = {name: declared[name] for name in sorted(query.tables_named()) if name in declared}
        plan = await asyncio.to_thread(self._plan, query, self._catalog.topics(), tables)
        if self._settings.sql_require_bounded_state and (
            unbounded := next((info for info in plan.state if not info.is_bounded), None)
        ):
            raise InvalidStatement(
                f"{unbounded.operator} keeps {unbounded.holds}, which nothing bounds, and sql_require_bounded_state is "
                "set; WITH (state_ttl = '…') bounds it"
            )
        return plan, list(tables.values())

    def _check_output(self, query: ContinuousQuery, plan: JobPlan) -> str:
        """Returns the topic that the job writes. Raises InvalidStatement, UnknownTopic."""
        columns = [name for name, _ in plan.output_columns]
        if problem := check_columns(columns):
            raise InvalidStatement(problem)
        if query.kind == "view":
            return query.name
        table = self._catalog.tables().get(query.target.lower())
        topic = query.target if table is None else table.topic
        if table is not None:
            _check_table(table, columns)
        if topic not in self._catalog.topics():
            raise UnknownTopic(f"there is no topic {topic!r} to write to: create it first", topic=topic)
        if any(source.topic == topic for source in plan.inputs):
            raise InvalidStatement(f"the query reads topic {topic!r}, which it is to write: it would never end")
        return topic

    async def _create_topic(self, name: str, plan: JobPlan) -> bytes:
        """Creates the topic of a view, with as many partitions as the largest input. Returns its id."""
        topics = self._catalog.topics()
        partitions = max((topics.get(source.topic, 1) for source in plan.inputs), default=1)
        # What a job has written must not be lost below its checkpoint, and a take-over must know at once what is there.
        request = pb.CreateTopicRequest(topic=name, partitions=partitions, min_acks=ACKS_DURABLE)
        try:
            return (await self._coordinator.create_topic(request)).topic_id
        except TopicExists as error:
            raise TopicExists(
                f"topic {name!r} exists already, and the changes of the view would go to a topic of its name: give the "
                "view another one",
                topic=name,
            ) from error

    # ---- the others

    async def _explain(self, query: ContinuousQuery) -> list[str]:
        _check_inputs(query, await self._jobs())
        plan, _ = await self._planned(query)
        if query.kind == "live":
            # The warnings name options of WITH, which a live query has not.
            lines = [line for line in explained_job(plan) if not line.startswith("WARNING")]
            return ["live query", *lines, "parallelism: one task, in the service that the client asked"]
        topic = self._check_output(query, plan)
        lines = [f"{query.kind} to topic {topic}", *explained_job(plan)]
        return [*lines, "parallelism: one task, in the worker that holds the job"]

    async def _drop(self, statement: DropJob) -> None:
        try:
            job = await self._find(statement.kind, statement.name)
        except UnknownJob:
            if statement.if_exists:
                return
            raise
        # It was there a moment ago: the answer to a first try was lost, or another statement has dropped it.
        with contextlib.suppress(UnknownJob):
            await self._coordinator.drop_sql_job(pb.DropSqlJobRequest(job=job.job))
        if job.kind == "view":  # which made the topic
            await self._delete_topic(job.output_topic, job.output_topic_id)
            await self._catalog.refresh()

    def _shown(self, jobs: Sequence[pb.SqlJobInfo]) -> Any:
        rows = [
            (
                job.job,
                job.kind,
                job.state,
                job.output_topic,
                job.worker_id,
                job.epoch,
                job.journal_number,
                job.checkpoint_number,
                job.progress.lag_records if job.HasField("progress") else None,
                job.progress.watermark_us if job.progress.HasField("watermark_us") else None,
                job.progress.state_bytes if job.HasField("progress") else None,
                job.reason or self._trouble(job.job),
                job.statement,
            )
            for job in jobs
        ]
        columns: dict[str, list[Any]] = {name: [row[at] for row in rows] for at, (name, _, _) in enumerate(JOB_COLUMNS)}
        return table_of(columns, {name: kind for name, _, kind in JOB_COLUMNS})


def _check_inputs(query: ContinuousQuery, jobs: Sequence[pb.SqlJobInfo]) -> None:
    """Refuses a query that reads a view, whose name hides the topic with its changes. Raises InvalidStatement."""
    named = query.tables_named()
    if view := next((job for job in jobs if job.kind == "view" and job.job in named), None):
        raise InvalidStatement(
            f"{view.job} is a view, and continuous queries over views are not supported yet; a table that is declared "
            f"WITH (topic = '{view.output_topic}') reads its changes",
            clause=view.job,
        )


def _name_of(target: str) -> str:
    """Returns a name for the job of an INSERT."""
    return f"insert_{_NO_LETTER.sub('_', target.lower())[:100]}_{secrets.token_hex(3)}"


def _check_table(table: TableDefinition, columns: Sequence[str]) -> None:
    """Checks that a declared table can read the records that a job writes to its topic. Raises InvalidStatement."""
    if table.format != "json":
        raise InvalidStatement(
            f"table {table.name} has format {table.format}; INSERT INTO writes json", clause=table.name
        )
    if any(name in VALUE_COLUMNS for name in columns):
        return
    for name in columns:
        column = table.column(name)
        if name not in KEY_COLUMNS and (column is None or not column.is_field):
            fields = ", ".join(column.name for column in table.columns if column.is_field)
            raise InvalidStatement(f"table {table.name} has no column {name!r} of its value; it has {fields}")


def _status(lines: Sequence[str]) -> Any:
    return table_of({"status": list(lines)}, {"status": pa.string()})
