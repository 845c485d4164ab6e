"""Puts the worker of continuous queries together: the only place of it that names concrete classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from shcluster.peers import Peers
from shcluster.sequenced_writer import SequencedWriter
from shproto.errors import InvalidStatement
from shproto.services import CoordinatorApi
from shproto.v1 import coordinator_pb2
from shread.reads import Reads
from shruntime.memory import MIB
from shstore import ObjectStore

from streamhouse_sql.adapters.duck import Duck, DuckLimits
from streamhouse_sql.catalog import tables_of
from streamhouse_sql.core.continuous.statements import ContinuousQuery, parse_job_statement
from streamhouse_sql.jobs.checkpoints import Checkpoints
from streamhouse_sql.jobs.encode import Encoder
from streamhouse_sql.jobs.journal import Journal
from streamhouse_sql.jobs.programs import Programs
from streamhouse_sql.jobs.run import JobParts, PlannedJob
from streamhouse_sql.jobs.statements import PlanJob
from streamhouse_sql.jobs.worker import JobWorker
from streamhouse_sql.pipeline import Pipeline, plan_job
from streamhouse_sql.settings import SqlSettings

# Memory that turns rows of a micro-batch into JSON, if these are not unusually large.
ENCODER_BYTES_MIN = 64 * MIB


def _limits(settings: SqlSettings) -> DuckLimits:
    return DuckLimits(
        memory_bytes_max=settings.sql_job_memory_bytes_max,
        temp_dir=settings.sql_temp_dir,
        temp_bytes_max=settings.sql_job_temp_bytes_max,
        threads=1,  # the order of rows, and so their sums, is part of the result
    )


def planner(settings: SqlSettings) -> PlanJob:
    """Returns the function that makes the program of a query, over topics and declared tables; it blocks."""
    limits = _limits(settings)
    return lambda query, topics, tables: plan_job(query, topics, tables, lambda: Duck(limits))


def build_worker(
    settings: SqlSettings,
    coordinator: CoordinatorApi,
    reads: Reads,
    store: ObjectStore,
    peers: Peers,
    token: Callable[[], str],
) -> JobWorker:
    """Returns the worker that runs continuous queries. `store`: of their state; `peers`: their output goes through;
    `token`: of the session under which jobs are held, empty while there is none. Does no I/O."""
    limits = _limits(settings)
    encoding = DuckLimits(
        memory_bytes_max=max(ENCODER_BYTES_MIN, 8 * settings.sql_gather_bytes_max),
        temp_dir=settings.sql_temp_dir,
        temp_bytes_max=0,
        threads=1,
    )

    def plan_of(job: coordinator_pb2.SqlJobInfo, topics: Mapping[str, int]) -> PlannedJob:
        statement = parse_job_statement(job.statement)
        if not isinstance(statement, ContinuousQuery):
            raise InvalidStatement(f"the statement of job {job.job} is no continuous query")
        plan = plan_job(statement, topics, tables_of(job.definitions), lambda: Duck(limits))
        columns = [name for name, _ in plan.output_columns]
        return PlannedJob(
            plan=plan,
            new_pipeline=lambda: Pipeline(plan, Duck(limits)),
            new_encoder=lambda: Encoder(columns, plan.key_columns, Duck(encoding), is_changelog=plan.is_changelog),
        )

    def new_writer(job: coordinator_pb2.SqlJobInfo, partition: int) -> SequencedWriter:
        return SequencedWriter(
            peers, job.output_topic, partition, producer_id=job.producer_id, producer_epoch=job.epoch
        )

    parts = JobParts(
        reads=reads,
        settings=settings,
        journal=Journal(coordinator, token),
        checkpoints=Checkpoints(
            store,
            coordinator,
            token,
            state_bytes_max=settings.sql_job_memory_bytes_max + settings.sql_job_temp_bytes_max,
        ),
        decoders=ThreadPoolExecutor(settings.sql_job_threads, "job decode"),
        programs=Programs(settings.sql_job_threads),
        plan_of=plan_of,
        new_writer=new_writer,
    )
    return JobWorker(parts, coordinator, token)
