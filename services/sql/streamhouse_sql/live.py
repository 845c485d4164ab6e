"""Live queries: `SELECT … EMIT CHANGES`, whose client reads the changes of the result as they come.

Owns: the live queries that run, their feeds, threads and instances. Does not own: how a program computes (pipeline.py),
how topics are read on and on (jobs/gather.py).
Invariants: at most `sql_live_statements_max` run at once, beside the turns of bounded statements. A query whose client
does not read its result computes STEPS_AHEAD micro-batches more, and then reads no records. A query that is over has no
task, thread, feed, memory or file left; one whose thread heeds no interrupt counts until that ends. Nothing of a query
is stored: a client that comes again gets the result from the beginning.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from concurrent.futures import Executor
from functools import partial
from typing import TypeVar

import pyarrow as pa
from shproto.errors import (
    InvalidStatement,
    Overloaded,
    ShuttingDown,
    StatementLimit,
    StatementTimeout,
    StreamHouseError,
    UnknownTopic,
)
from shproto.rpc import being_cancelled
from shread.reads import Reads
from shruntime.tasks import run_to_end

from streamhouse_sql import telemetry
from streamhouse_sql.ahead import Ahead
from streamhouse_sql.arrow import to_stream
from streamhouse_sql.catalog import Catalog
from streamhouse_sql.core.continuous.model import JobPlan
from streamhouse_sql.core.continuous.statements import ContinuousQuery
from streamhouse_sql.jobs.encode import OP, check_no_sign, json_of, kinds_of_changes, whole
from streamhouse_sql.jobs.gather import Gather, Gathered, GatherLimits
from streamhouse_sql.jobs.micro_batch import InputPosition
from streamhouse_sql.pipeline import Pipeline, plan_job
from streamhouse_sql.ports import JobEngine
from streamhouse_sql.responses import Answer, responses
from streamhouse_sql.settings import SqlSettings
from streamhouse_sql.threads import run_interruptibly

log = logging.getLogger(__name__)
T = TypeVar("T")

# Results of micro-batches that wait for the client: the next one is computed while a result is sent.
STEPS_AHEAD = 1
# For the end of a query, which takes some ms: some functions of DuckDB, over very long values, heed no interrupt.
END_WAIT_MS = 5_000
RETRY_MS = 500
# Entry of the schema's metadata that says how the changes are put together to the result.
METADATA = b"streamhouse.live"


class LiveQueries:
    """Runs live queries. `new_engine` opens an instance with one thread; `views` returns the names of
    views. `close` ends those that run."""

    def __init__(
        self,
        reads: Reads,
        catalog: Catalog,
        settings: SqlSettings,
        new_engine: Callable[[], JobEngine],
        decoders: Executor,
        views: Callable[[], Awaitable[Collection[str]]],
    ) -> None:
        self.reads = reads
        self.catalog = catalog
        self.settings = settings
        self.new_engine = new_engine
        self.decoders = decoders
        self.views = views
        self.runs: set[_Run] = set()
        self._is_closed = False

    async def close(self) -> None:
        """Ends the queries that run with ShuttingDown. A thread that does not heed its interrupt for END_WAIT_MS is
        left to end with the process."""
        self._is_closed = True
        runs = list(self.runs)
        for run in runs:
            run.end(ShuttingDown("this SQL service is stopping"))
        if runs:
            _, left = await asyncio.wait([run.task for run in runs], timeout=END_WAIT_MS / 1000)
            if left:
                log.error("%d live queries do not heed their interrupt; the service stops without them", len(left))

    async def run(self, query: ContinuousQuery, timeout_ms: int) -> AsyncGenerator[Answer]:
        """Runs a live query, and yields its changes as they come, before them its schema. Goes on until its caller
        ends it, or `timeout_ms` is over; 0: no limit.

        Raises InvalidStatement, StatementFailed, StatementLimit, StatementTimeout, Overloaded, ShuttingDown, and the
        errors of reading: DataLoss, OffsetBelowStart, UnknownTopic.
        """
        self._check_room()
        run = _Run(self, query, timeout_ms)
        try:
            while (answer := await run.next()) is not None:
                yield answer
        finally:
            run.end(None)
            await asyncio.wait((run.task,), timeout=END_WAIT_MS / 1000)

    def _check_room(self) -> None:
        if self._is_closed:
            raise ShuttingDown("this SQL service is stopping")
        limit = self.settings.sql_live_statements_max
        if len(self.runs) >= limit:
            raise Overloaded(
                f"{limit} live queries run already (sql_live_statements_max), and end when their clients end them",
                retry_after_ms=RETRY_MS,
                limit="sql_live_statements_max",
                value=limit,
            )


class _Run:
    """A live query that runs. `task` ends with everything that the query holds."""

    def __init__(self, live: LiveQueries, query: ContinuousQuery, timeout_ms: int) -> None:
        self._live = live
        self._query = query
        self._ended_by: StreamHouseError | None = None
        self._is_ending = False
        self._pipeline: Pipeline | None = None
        self._keys: JobEngine | None = None
        self._trial: JobEngine | None = None  # of the planner, which closes it
        self.steps = 0  # micro-batches that were begun
        self._answers = Ahead(self._changes(), STEPS_AHEAD, "sql live query")
        self.task = self._answers.task
        live.runs.add(self)
        telemetry.live_statements_running.add(1)
        self.task.add_done_callback(self._over)
        self._expiry: asyncio.TimerHandle | None = None
        if timeout_ms:
            error = StatementTimeout(f"the live query was ended after {timeout_ms} ms", timeout_ms=timeout_ms)
            self._expiry = asyncio.get_running_loop().call_later(timeout_ms / 1000, self.end, error)

    def _over(self, task: asyncio.Task[None]) -> None:
        self._live.runs.discard(self)
        telemetry.live_statements_running.add(-1)
        if self._expiry is not None:
            self._expiry.cancel()
        if not task.cancelled():
            task.exception()  # seen: `next` raises it, if its caller still asks

    def end(self, reason: StreamHouseError | None) -> None:
        """Begins to end the query; its caller gets the reason, if there is one. Idempotent."""
        if not self._is_ending and not self.task.done():
            self._is_ending, self._ended_by = True, reason
            self.task.cancel()

    async def next(self) -> Answer | None:
        """Returns the next part of the changes. Raises the reason for which the query ended."""
        try:
            return await self._answers.next()
        except asyncio.CancelledError:
            if self._ended_by is None or being_cancelled():
                raise
            raise self._ended_by from None

    # ---- the task

    async def _changes(self) -> AsyncGenerator[Answer]:
        """Yields the schema, and then the changes of each micro-batch."""
        live = self._live
        plan = await self._planned()
        try:
            await self._in_thread(partial(self._open, plan))
            first = await self._in_thread(partial(self._step, plan, Gathered(ranges=(), idle=(), inputs={})))
            yield Answer(arrow_stream=to_stream(first.schema, []), rows=0)
            for answer in _answers(first):
                yield answer
            gather = Gather(live.reads, live.decoders, plan.inputs, self._places(plan), GatherLimits.of(live.settings))
            try:
                while True:
                    gathered = await gather.next()
                    changes = await self._in_thread(partial(self._step, plan, gathered))
                    for answer in await self._in_thread(partial(_answers, changes)):
                        yield answer
            finally:
                await gather.close()
        finally:
            await run_to_end(self._close)

    async def _planned(self) -> JobPlan:
        """Returns the program. The index may be a moment behind: it is asked for all that is known before a name is
        refused."""
        live, catalog = self._live, self._live.catalog
        if view := next(iter(sorted(self._query.tables_named().intersection(await live.views()))), None):
            # Its name hides the topic with its changes, which would be read as it is.
            raise InvalidStatement(
                f"{view} is a view, and live queries over views are not supported yet; a table that is declared WITH "
                f"(topic = '{view}') reads its changes",
                clause=view,
            )

        def trial() -> JobEngine:
            self._trial = live.new_engine()
            return self._trial

        async def planned() -> JobPlan:
            topics, tables = catalog.topics(), catalog.tables()
            return await self._in_thread(lambda: plan_job(self._query, topics, tables, trial))

        try:
            plan = await planned()
        except InvalidStatement:
            await catalog.refresh()
            plan = await planned()
        if problem := check_no_sign([name for name, _ in plan.output_columns]):
            raise InvalidStatement(problem, clause=OP)
        return plan

    def _places(self, plan: JobPlan) -> dict[str, InputPosition]:
        """Returns the beginnings of the topics: the log start of each partition."""
        topics = self._live.reads.index.topics()
        places = {}
        for source in plan.inputs:
            entry = topics.get(source.topic)
            if entry is None:
                raise UnknownTopic(f"there is no topic {source.topic!r} any more", topic=source.topic)
            places[source.name] = InputPosition(
                topic=source.topic, topic_id=entry.topic_id.hex(), first_partitions=entry.partitions, offsets={}
            )
        return places

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Returns the result of `work`, run in a thread. Raises StatementTimeout for a micro-batch that takes too
        long."""
        timeout_ms = self._live.settings.sql_job_step_timeout_ms
        try:
            async with asyncio.timeout(timeout_ms / 1000) as limit:
                return await run_interruptibly(work, self._interrupt)
        except TimeoutError:
            if not limit.expired():
                raise
            raise StatementTimeout(
                f"a micro-batch takes longer than {timeout_ms} ms (sql_job_step_timeout_ms)", timeout_ms=timeout_ms
            ) from None

    def _interrupt(self) -> None:
        for part in (self._trial, self._pipeline, self._keys):
            if part is not None:
                part.interrupt()

    def _open(self, plan: JobPlan) -> None:
        # Set in the thread: a caller that is cancelled meanwhile gets no result, and what was opened is to be closed.
        self._pipeline = Pipeline(plan, self._live.new_engine())
        if plan.is_changelog and plan.key_columns:
            self._keys = self._live.new_engine()

    def _close(self) -> None:
        for part in (self._pipeline, self._keys):
            if part is not None:
                part.close()

    def _step(self, plan: JobPlan, gathered: Gathered) -> pa.Table:
        """Returns the changes of a micro-batch, the kind of each in the first column."""
        assert self._pipeline is not None, "open"
        self.steps += 1
        now_us = self._live.reads.clock.wall_ms() * 1000
        rows = self._pipeline.step(gathered.inputs, idle=gathered.idle, now_us=now_us).rows
        telemetry.live_rows.add(rows.num_rows)
        limit = self._live.settings.sql_memory_bytes_max
        if rows.nbytes > limit:
            raise StatementLimit(
                f"the changes of a micro-batch have {rows.nbytes} bytes, sql_memory_bytes_max is {limit}",
                limit="sql_memory_bytes_max",
                value=rows.nbytes,
            )
        return self._with_kinds(plan, rows)

    def _with_kinds(self, plan: JobPlan, rows: pa.Table) -> pa.Table:
        if not plan.is_changelog:
            kinds = pa.repeat("+I", rows.num_rows)
        else:
            signs = rows.column(0).to_numpy()
            rows = rows.remove_column(0)
            keys = None
            if self._keys is not None and rows.num_rows:
                self._keys.add_table("result", rows)
                found = self._keys.fetch(f"SELECT {json_of(plan.key_columns)} AS key FROM result")
                keys = whole(found.column("key"))
                self._keys.remove_table("result")
            kinds = kinds_of_changes(signs, keys).cast(pa.string())
        described = {"key_columns": plan.key_columns, "is_changelog": plan.is_changelog}
        rows = rows.add_column(0, pa.field(OP, pa.string(), nullable=False), kinds)
        return rows.replace_schema_metadata({METADATA: json.dumps(described)})


def _answers(changes: pa.Table) -> list[Answer]:
    parts = responses(changes.schema, iter(changes.to_batches()))
    return [Answer(arrow_stream=stream, rows=rows) for stream, rows in parts]
