"""Results of views, for queries: from the job that runs here, or from the worker that holds it.

Owns: the list of jobs as it was a moment ago, the columns of their views. Does not own: the jobs.
Invariants: a result is that of a micro-batch that is journalled, so no later crash takes it back. A worker that may
have lost its jobs answers nothing. A view that this process created or dropped is known, or unknown, to its next
statement.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, cast

import pyarrow as pa
from shproto.errors import InvalidStatement, StatementLimit, StreamHouseError, Unavailable
from shproto.limits import RETRY_FIRST_MS, RETRY_MS_MAX
from shproto.services import CoordinatorApi, SqlApi
from shproto.v1 import coordinator_pb2 as pb
from shproto.v1 import sql_pb2
from shruntime.clock import Clock
from shruntime.tasks import Backoff, cancel_and_wait, retry

from streamhouse_sql.core.quoting import literal, quoted
from streamhouse_sql.jobs.run import Equals
from streamhouse_sql.jobs.worker import JobWorker
from streamhouse_sql.settings import SqlSettings

log = logging.getLogger(__name__)

# Age of the list of jobs: a view that another process has created is known after this time.
LIST_MS = 1_000

Columns = tuple[tuple[str, str], ...]


class Views:
    """Views by name in small letters. `columns_of` plans a job and returns its output columns, and blocks; `sql_at`
    returns the SQL service at an address."""

    def __init__(
        self,
        coordinator: CoordinatorApi,
        worker: JobWorker,
        settings: SqlSettings,
        clock: Clock,
        columns_of: Callable[[pb.SqlJobInfo], Sequence[tuple[str, str]]],
        sql_at: Callable[[str], SqlApi],
    ) -> None:
        self._coordinator = coordinator
        self._worker = worker
        self._settings = settings
        self._clock = clock
        self._columns_of = columns_of
        self._sql_at = sql_at
        self._jobs: dict[str, pb.SqlJobInfo] = {}
        self._columns: dict[str, Columns | None] = {}  # by job id; None: the statement cannot be planned
        self._listed_ms: int | None = None
        self._refreshing: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """Ends the look at the coordinator that is under way."""
        if self._refreshing is not None:
            await cancel_and_wait(self._refreshing)

    def changed(self) -> None:
        """Makes the next statement look at the jobs anew, and the worker for new ones."""
        self._listed_ms = None
        self._worker.wake()

    async def known(self) -> Mapping[str, Columns]:
        """Returns the columns (name, DuckDB type) of all views. Those of a moment ago, but for the first time and after
        `changed`: a statement does not wait for a coordinator that is slow or away."""
        if self._listed_ms is None:
            await self._refresh()
        elif self._clock.monotonic_ms() - self._listed_ms >= LIST_MS and (
            self._refreshing is None or self._refreshing.done()
        ):
            self._refreshing = asyncio.create_task(self._refresh(), name="list of views")
        found = {name: self._columns[job.job_id] for name, job in self._jobs.items()}
        return {name: columns for name, columns in found.items() if columns is not None}

    async def _refresh(self) -> None:
        try:
            await self._list()
        except StreamHouseError as error:
            # Asked again after LIST_MS, beside the statements.
            self._listed_ms = self._clock.monotonic_ms()
            log.info("the list of jobs is not new: %s", error.message)

    async def _list(self) -> None:
        listed = await self._coordinator.list_sql_jobs(pb.ListSqlJobsRequest())
        jobs = {job.job: job for job in listed.jobs if job.kind == "view"}
        for job in jobs.values():
            if job.job_id not in self._columns:
                # Lists are without definitions.
                found = await self._coordinator.list_sql_jobs(pb.ListSqlJobsRequest(job=job.job))
                for whole in found.jobs:  # none if it was dropped meanwhile, another one if it was made anew
                    self._columns[whole.job_id] = await self._planned(whole)
        jobs = {name: job for name, job in jobs.items() if job.job_id in self._columns}
        self._jobs = jobs
        for gone in self._columns.keys() - {job.job_id for job in jobs.values()}:
            del self._columns[gone]
        self._listed_ms = self._clock.monotonic_ms()

    async def _planned(self, job: pb.SqlJobInfo) -> Columns | None:
        try:
            return tuple(await asyncio.to_thread(self._columns_of, job))
        except StreamHouseError as error:
            log.error("the statement of view %s cannot be planned, and the view is hidden: %s", job.job, error.message)
            return None

    async def table(self, name: str, equals: Equals, *, is_local: bool) -> Any:
        """Returns the result of a view as a `pyarrow.Table`, or the rows with these values of columns; waits for a job
        that is being taken over, for `sql_read_wait_ms`. `is_local`: the caller asks the worker that holds the job.
        Raises Unavailable, InvalidStatement for a job that is paused or has failed, StatementLimit."""
        deadline_ms = self._clock.monotonic_ms() + self._settings.sql_read_wait_ms

        def is_final(error: StreamHouseError) -> bool:
            return is_local or not isinstance(error, Unavailable) or self._clock.monotonic_ms() >= deadline_ms

        backoff = Backoff(RETRY_FIRST_MS, RETRY_MS_MAX)
        return await retry(lambda: self._table(name, equals, is_local), backoff, is_final)

    async def _table(self, name: str, equals: Equals, is_local: bool) -> Any:
        run = self._worker.runs.get(name)
        if run is not None:
            self._worker.check_holder()
            return await run.view_table(equals)
        if is_local:
            raise Unavailable(f"this worker does not hold view {name}", retry_after_ms=RETRY_MS_MAX)
        await self._list()
        job = self._jobs.get(name)
        if job is None:
            raise InvalidStatement(f"there is no view {name!r} any more", name=name)
        if job.state != "running":
            raise InvalidStatement(
                f"view {name} is {job.state}{f': {job.reason}' if job.reason else ''}; ALTER MATERIALIZED VIEW {name} "
                "RESUME lets it go on",
                name=name,
            )
        if not job.worker_address:
            raise Unavailable(f"no worker holds view {name} at the moment", retry_after_ms=RETRY_MS_MAX)
        return await self._remote(name, job, equals)

    async def _remote(self, name: str, job: pb.SqlJobInfo, equals: Equals) -> Any:
        values = (f"{quoted(column)} = {literal(x) if isinstance(x, str) else x}" for column, x in equals)
        where = f" WHERE {' AND '.join(values)}" if equals else ""
        request = sql_pb2.ExecuteRequest(statement=f"SELECT * FROM {quoted(name)}{where}", local_views=True)
        answers = self._sql_at(job.worker_address).execute(request)
        limit = self._settings.sql_memory_bytes_max
        tables: list[Any] = []
        size_bytes = 0
        async with aclosing(cast("Any", answers)) as responses:
            response: sql_pb2.ExecuteResponse
            async for response in cast("AsyncIterator[sql_pb2.ExecuteResponse]", responses):
                with pa.ipc.open_stream(response.arrow_stream) as reader:
                    tables.append(reader.read_all())
                size_bytes += tables[-1].nbytes
                if size_bytes > limit:
                    raise StatementLimit(
                        f"view {name}, which worker {job.worker_id} at {job.worker_address} holds, has more than "
                        f"{limit} bytes (sql_memory_bytes_max): ask that worker",
                        limit="sql_memory_bytes_max",
                        value=size_bytes,
                    )
        return pa.concat_tables(tables)
