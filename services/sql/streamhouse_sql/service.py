"""Statements: each runs in an instance of DuckDB of its own, over the topics as they are when it starts.

Owns: the statements that run and wait, their threads. Does not own: how records are read, how an instance computes.
Invariants: at most `sql_statements_max` run at once, and the others wait in their order. A statement that is over has
no thread, feed, memory or file left. The client learns the reason that is nearest to the cause: a
source's error before DuckDB's words for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pyarrow as pa
from shproto.errors import (
    InvalidArgument,
    InvalidStatement,
    Overloaded,
    ShuttingDown,
    StatementLimit,
    StatementTimeout,
    StreamHouseError,
)
from shread.reads import Reads
from shruntime.tasks import cancel_and_wait

from streamhouse_sql import telemetry
from streamhouse_sql.arrow import table_of, to_stream
from streamhouse_sql.catalog import Catalog
from streamhouse_sql.core.binding import BoundQuery, TopicScan, bind, with_suggestion
from streamhouse_sql.core.columns import RECORD_COLUMNS
from streamhouse_sql.core.continuous.statements import (
    AlterJob,
    ContinuousQuery,
    DropJob,
    ExplainContinuous,
    JobStatement,
    ShowJobs,
    parse_job_statement,
)
from streamhouse_sql.core.explain import explained
from streamhouse_sql.core.parameters import Parameters
from streamhouse_sql.core.statement import (
    CreateTable,
    Describe,
    DropTable,
    Explain,
    Query,
    ShowTables,
    Statement,
    parse,
    query_of_table,
)
from streamhouse_sql.core.tables import TableColumn, TableDefinition
from streamhouse_sql.jobs.statements import JobStatements
from streamhouse_sql.jobs.views import Views
from streamhouse_sql.live import LiveQueries
from streamhouse_sql.ports import Engine, Interrupted, JobEngine
from streamhouse_sql.responses import Answer, responses
from streamhouse_sql.settings import SqlSettings
from streamhouse_sql.snapshot import Snapshot, oldest_needed_ms
from streamhouse_sql.sources import Sources
from streamhouse_sql.threads import INTERRUPT_AGAIN_MS, in_daemon

log = logging.getLogger(__name__)
T = TypeVar("T")
AnyStatement = Statement | JobStatement

# Rows of a batch that DuckDB hands over: eight of its vectors.
BATCH_ROWS = 16_384
# For the end of a statement, which takes some ms: some functions of DuckDB, over very long values, heed no interrupt.
END_WAIT_MS = 5_000
# A service that stops waits so long for such a statement, whose thread then ends with the process.
ABANDON_MS = 5_000
RETRY_MS = 500
_NO_PARAMETERS = Parameters()


class SqlService:
    """Runs statements. `new_engine` opens an engine for a statement, `new_job_engine` for a live query. `close` ends
    those that run."""

    def __init__(
        self,
        reads: Reads,
        catalog: Catalog,
        settings: SqlSettings,
        new_engine: Callable[[], Engine],
        new_job_engine: Callable[[], JobEngine],
        jobs: JobStatements,
        views: Views,
    ) -> None:
        self.new_engine = new_engine
        self.views = views
        self._jobs = jobs
        self._reads = reads
        self._catalog = catalog
        self._settings = settings
        self._slots = asyncio.Semaphore(settings.sql_statements_max)
        self._waiting = 0
        self.runs: set[_Run] = set()
        self.is_closed = False
        self._ends: set[asyncio.Task[None]] = set()
        self._decoders = ThreadPoolExecutor(settings.sql_threads, "sql decode")
        self.live = LiveQueries(reads, catalog, settings, new_job_engine, self._decoders, views.known)

    async def close(self) -> None:
        """Ends the statements that run with ShuttingDown, then the threads."""
        self.is_closed = True
        await asyncio.gather(
            self.live.close(), *(run.end(ShuttingDown("this SQL service is stopping")) for run in list(self.runs))
        )
        if self._ends:
            await asyncio.wait(self._ends)
        self._decoders.shutdown(wait=False, cancel_futures=True)

    async def execute(self, text: str, timeout_ms: int, *, local_views: bool = False) -> AsyncGenerator[Answer]:
        """Runs a statement, and yields its result in parts; the last has the counts. `local_views`: another SQL service
        asks, for a view that this one has to hold.

        Raises InvalidArgument, InvalidStatement, StatementFailed, StatementLimit, StatementTimeout, Overloaded, and the
        errors of reading: DataLoss, Unavailable, OffsetBelowStart.
        """
        self._check_size(text)
        began_s = time.monotonic()
        outcome = "failed"
        is_live = False
        try:
            # In a thread: a large text takes its parser a second, in which the loop has others to serve.
            statement = await asyncio.to_thread(parse_any, text)
            is_live = isinstance(statement, ContinuousQuery) and statement.kind == "live"
            if isinstance(statement, ContinuousQuery) and is_live:
                timeout_ms = _limited(timeout_ms, "sql_live_timeout_ms", self._settings.sql_live_timeout_ms)
                async with contextlib.aclosing(self.live.run(statement, timeout_ms)) as answers:
                    async for answer in answers:
                        yield answer
                return
            timeout_ms = _limited(timeout_ms, "sql_timeout_ms", self._settings.sql_timeout_ms)
            if isinstance(statement, Query):
                async with contextlib.aclosing(self._run(statement, began_s, timeout_ms, local_views)) as answers:
                    async for answer in answers:
                        yield answer
            else:
                batch = await self._command(statement, began_s, timeout_ms)
                yield Answer(
                    arrow_stream=to_stream(batch.schema, [batch]),
                    rows=batch.num_rows,
                    is_last=True,
                    elapsed_ms=_elapsed_ms(began_s),
                )
            outcome = "done"
        except (asyncio.CancelledError, GeneratorExit):
            outcome = "cancelled"
            raise
        finally:
            telemetry.statements.add(1, {"outcome": outcome})
            if not is_live:  # whose client chooses how long it takes
                telemetry.statement_duration_ms.record(_elapsed_ms(began_s))

    def _check_size(self, text: str) -> None:
        size_bytes, limit = len(text.encode()), self._settings.sql_statement_bytes_max
        if size_bytes > limit:
            raise InvalidArgument(
                f"statement has {size_bytes} bytes, sql_statement_bytes_max is {limit}",
                field="statement",
                value=size_bytes,
                limit=limit,
            )

    async def _turn(self, deadline_s: float, timeout_ms: int) -> _Run:
        """Waits for a statement's turn. Returns the statement, which holds the turn until it is over."""
        if self.is_closed:
            raise ShuttingDown("this SQL service is stopping")
        if self._slots.locked() and self._waiting >= self._settings.sql_statements_waiting_max:
            raise Overloaded(
                f"{self._settings.sql_statements_max} statements run and {self._waiting} wait "
                "(sql_statements_waiting_max)",
                retry_after_ms=RETRY_MS,
                limit="sql_statements_waiting_max",
                value=self._waiting,
            )
        self._waiting += 1
        try:
            async with asyncio.timeout(max(0.0, deadline_s - time.monotonic())):
                await self._slots.acquire()
        except TimeoutError:
            raise StatementTimeout(
                f"other statements ran for all of its {timeout_ms} ms", timeout_ms=timeout_ms
            ) from None
        finally:
            self._waiting -= 1
        if self.is_closed:  # the turn came from a statement that the stop has ended
            self._slots.release()
            raise ShuttingDown("this SQL service is stopping")
        telemetry.statements_running.add(1)
        is_held = True

        def free() -> None:
            nonlocal is_held
            if is_held:
                is_held = False
                telemetry.statements_running.add(-1)
                self._slots.release()

        return _Run(self, deadline_s, timeout_ms, free)

    # ---- statements about topics

    async def _command(self, statement: AnyStatement, began_s: float, timeout_ms: int) -> Any:
        """Returns the result of a statement that reads no records, as a `pyarrow.RecordBatch`."""
        match statement:
            case ContinuousQuery() | ExplainContinuous() | DropJob() | AlterJob() | ShowJobs():
                return await _within(began_s, timeout_ms, self._jobs.run(statement))
            case ShowTables():
                return self._show_tables(await self.views.known())
            case Explain(query):
                return await self._explain(query, began_s, timeout_ms)
            case Describe(_, Query() as query):
                return _described(await self._columns_of(query, self._catalog.tables(), began_s, timeout_ms))
            case Describe(str() as name, _):
                return await self._describe(name, began_s, timeout_ms)
            case CreateTable():
                await self._create_table(statement, began_s, timeout_ms)
                return _done("CREATE TABLE")
            case DropTable(name, if_exists):
                await self._catalog.drop(name, if_exists=if_exists)
                return _done("DROP TABLE")
        raise AssertionError(f"no command: {statement}")

    def _show_tables(self, views: Collection[str]) -> Any:
        topics = self._catalog.topics()
        rows: list[tuple[str, str, str, int | None]]
        rows = [(name, "topic", name, partitions) for name, partitions in topics.items()]
        for name, table in self._catalog.tables().items():
            rows.append((name, "table", table.topic, topics.get(table.topic)))
        rows += [(name, "view", name, topics.get(name)) for name in views]
        rows.sort(key=lambda row: row[:2])
        names = ("name", "kind", "topic", "partitions")
        columns: dict[str, list[Any]] = {name: [row[i] for row in rows] for i, name in enumerate(names)}
        types = {"name": pa.string(), "kind": pa.string(), "topic": pa.string(), "partitions": pa.int32()}
        return table_of(columns, types)

    async def _describe(self, name: str, began_s: float, timeout_ms: int) -> Any:
        if (view := (await self.views.known()).get(name.lower())) is not None:
            return _described([(column, kind, "") for column, kind in view])
        query = query_of_table(name)
        await self._bind(query, self._catalog.tables())
        table = self._catalog.tables().get(name.lower())
        if table is None:
            return _described([(column.name, column.type, column.comment) for column in RECORD_COLUMNS])
        columns = await self._columns_of(query, {name.lower(): table}, began_s, timeout_ms)
        return _described([(name, kind, _comment(table, name)) for name, kind, _ in columns])

    async def _create_table(self, statement: CreateTable, began_s: float, timeout_ms: int) -> None:
        """Declares a table, after DuckDB has seen its types and expressions."""
        definition = statement.definition
        tables = {definition.name.lower(): definition}
        await self._columns_of(query_of_table(definition.name), tables, began_s, timeout_ms)
        await self._catalog.create(statement)

    async def _explain(self, query: Query, began_s: float, timeout_ms: int) -> Any:
        bound = await self._bind(query)
        async with await self._turn(began_s + timeout_ms / 1000, timeout_ms) as run:
            snapshot, oldest_ms = await run.prepare(bound)
            lines = [
                line
                for scan in bound.scans
                for line in explained(
                    scan,
                    [
                        (part.partition.partition, part.offset_from, part.offset_to)
                        for part in snapshot.ranges(scan, None)
                    ],
                    oldest_ms[scan.name],
                )
            ]
            plan = await self._computed(run, query, None, lambda: run.engine.plan(bound.sql))
        return table_of({"plan": [*lines, *plan.splitlines()]}, {"plan": pa.string()})

    async def _columns_of(
        self, query: Query, tables: Mapping[str, TableDefinition], began_s: float, timeout_ms: int
    ) -> list[tuple[str, str, str]]:
        """Returns name, type and an empty comment of each column of a query's result."""
        bound = await self._bind(query, tables)
        async with await self._turn(began_s + timeout_ms / 1000, timeout_ms) as run:
            await run.prepare(bound)
            columns = await self._computed(run, query, tables, lambda: run.engine.columns(bound.sql))
        return [(name, kind, "") for name, kind in columns]

    # ---- queries

    async def open(
        self,
        query: Query,
        parameters: Parameters,
        timeout_ms: int = 0,
        *,
        cast: Callable[[str], str] = lambda kind: "{}",
    ) -> OpenQuery:
        """Waits for the query's turn, and begins it. Returns the query, whose caller closes it. `cast`: see
        Duck.typed_result. Raises the errors of `execute`."""
        timeout_ms = timeout_ms or self._settings.sql_timeout_ms
        opened = OpenQuery(self._check_result)
        try:
            bound = await self.bind(query, parameters)
            run = await self._turn(opened.began_s + timeout_ms / 1000, timeout_ms)
            await opened.begin(
                run,
                bound,
                lambda: self._computed(
                    run,
                    query,
                    None,
                    lambda: run.engine.typed_result(bound.sql, bound.values, BATCH_ROWS, cast),
                    parameters,
                ),
            )
        except BaseException as error:
            await opened.close(error)
            raise
        return opened

    async def command(self, statement: AnyStatement, timeout_ms: int = 0) -> Any:
        """Returns the result of a statement that is no query, as a `pyarrow.RecordBatch`. Raises the errors of
        `execute`."""
        return await self._command(statement, time.monotonic(), timeout_ms or self._settings.sql_timeout_ms)

    async def _run(self, query: Query, began_s: float, timeout_ms: int, local_views: bool) -> AsyncGenerator[Answer]:
        bound = await self._bind(query)
        async with await self._turn(began_s + timeout_ms / 1000, timeout_ms) as run:
            await run.prepare(bound, local_views=local_views)
            schema, batches = await self._computed(run, query, None, lambda: run.engine.result(bound.sql, BATCH_ROWS))
            parts = responses(schema, batches)
            rows = size_bytes = 0
            empty = to_stream(schema, [])
            pending: tuple[bytes, int] | None = None
            while (part := await run.in_thread(lambda: next(parts, None))) is not None:
                rows += part[1]
                size_bytes += len(part[0])
                self._check_result(rows, size_bytes)
                if pending is not None:
                    yield Answer(arrow_stream=pending[0], rows=pending[1])
                pending = part
            counts = run.sources.counts
            yield Answer(
                arrow_stream=pending[0] if pending else empty,
                rows=rows,
                is_last=True,
                records_scanned=counts.records,
                bytes_scanned=counts.size_bytes,
                elapsed_ms=_elapsed_ms(began_s),
            )

    async def _computed(
        self,
        run: _Run,
        query: Query,
        tables: Mapping[str, TableDefinition] | None,
        work: Callable[[], T],
        parameters: Parameters = _NO_PARAMETERS,
    ) -> T:
        """Returns the result of the engine's first look at a query. The engine knows the columns that the query names;
        if it refuses the query, it is asked again with all of them, so that the error suggests the right one."""
        try:
            return await run.in_thread(work)
        except InvalidStatement:
            known = self._catalog.tables() if tables is None else tables
            bound = await self._bind(query, known, parameters, all_columns=True)
            for scan in bound.scans:
                run.engine.add_table(scan.name, run.sources.table((), scan))
            try:
                await run.in_thread(lambda: run.engine.columns(bound.sql, bound.values))
            except InvalidStatement as error:
                raise InvalidStatement(with_suggestion(str(error), known)) from error
            raise

    def _check_result(self, rows: int, size_bytes: int) -> None:
        for unit, value in (("rows", rows), ("bytes", size_bytes)):
            name = f"sql_result_{unit}_max"
            limit = getattr(self._settings, name)
            if value > limit:
                raise StatementLimit(f"the result has more than {limit} {unit} ({name})", limit=name, value=value)

    async def bind(self, query: Query, parameters: Parameters) -> BoundQuery:
        """Returns the query over its topics, with values of its parameters. Raises InvalidStatement, Unavailable."""
        return await self._bind(query, None, parameters)

    async def bind_all_columns(self, query: Query, parameters: Parameters) -> BoundQuery:
        """Returns the query over all columns of its topics: to plan, so that errors suggest the right column."""
        return await self._bind(query, None, parameters, all_columns=True)

    async def _bind(
        self,
        query: Query,
        tables: Mapping[str, TableDefinition] | None = None,
        parameters: Parameters = _NO_PARAMETERS,
        *,
        all_columns: bool = False,
    ) -> BoundQuery:
        """Returns the query over its topics. `tables` None: those of the catalog. The index may be a moment behind: a
        name that it does not know is asked for before the statement is refused."""

        async def bound() -> BoundQuery:
            known = self._catalog.tables() if tables is None else tables
            views = await self.views.known()
            return await asyncio.to_thread(
                bind,
                query,
                self._catalog.topics(),
                known,
                parameters,
                all_columns=all_columns,
                views=views,
            )

        try:
            return await bound()
        except InvalidStatement as error:
            if "name" not in error.details:
                raise
        await self._catalog.refresh()
        self.views.changed()
        return await bound()

    @property
    def catalog(self) -> Catalog:
        """Names of topics and declared tables."""
        return self._catalog

    def new_sources(self) -> Sources:
        """Returns the tables of a statement."""
        return Sources(self._reads, self._decoders, read_wait_ms=self._settings.sql_read_wait_ms)

    def new_snapshot(self) -> Snapshot:
        """Returns the ends of topics for a statement."""
        return Snapshot(self._reads, read_wait_ms=self._settings.sql_read_wait_ms)

    def finish(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Starts the end of a statement as a task of the service. Returns the task, which `close` waits for."""
        task = asyncio.create_task(work, name="end of a sql statement")
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)
        return task


class _Run:
    """A statement that has its turn: instance, sources and deadline. As a context manager it leaves nothing behind.

    A statement also ends while its client does not take the result: at the deadline, and when the service stops.
    """

    def __init__(self, service: SqlService, deadline_s: float, timeout_ms: int, free_turn: Callable[[], None]) -> None:
        self._service = service
        self._deadline_s = deadline_s
        self._timeout_ms = timeout_ms
        self._free_turn = free_turn
        self._thread: asyncio.Future[Any] | None = None
        self._lookup: asyncio.Future[Any] | None = None
        self._engine: Engine | None = None
        self._ended_by: asyncio.Future[StreamHouseError] = asyncio.get_running_loop().create_future()
        self._is_abandoned = False
        self._expiry = asyncio.create_task(self._expire(), name="sql statement's deadline")
        self.sources = service.new_sources()

    @property
    def engine(self) -> Engine:
        """The engine, once `prepare` has begun."""
        assert self._engine is not None
        return self._engine

    async def __aenter__(self) -> _Run:
        self._service.runs.add(self)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._service.runs.discard(self)
        # A statement whose thread does not heed the interrupt holds its turn until it does; its caller does not wait.
        await asyncio.wait((self._service.finish(self._over()),), timeout=END_WAIT_MS / 1000)

    async def _over(self) -> None:
        await cancel_and_wait(self._expiry)
        await self._release()

    async def prepare(self, bound: BoundQuery, *, local_views: bool = False) -> tuple[Snapshot, dict[str, int | None]]:
        """Opens the instance with a table for each scan. Returns the ends that were taken, and by scan the timestamp
        in ms below which no record is needed. `local_views`: views of other workers are refused."""
        snapshot = self._service.new_snapshot()
        self._must_go_on()
        self._lookup = asyncio.ensure_future(snapshot.take(bound.scans))
        await self._result(self._lookup)
        await self.in_thread(self._open_engine)
        oldest_ms: dict[str, int | None] = {}
        for scan in bound.scans:
            oldest_ms[scan.name] = await self.in_thread(self._oldest_needed(scan))
            table = self.sources.table(snapshot.ranges(scan, oldest_ms[scan.name]), scan)
            self.engine.add_table(scan.name, table)
        for view in bound.views:
            self._must_go_on()
            reading = asyncio.ensure_future(self._service.views.table(view.view, view.equals, is_local=local_views))
            self._lookup = reading
            self.engine.add_table(view.name, await self._result(reading))
        return snapshot, oldest_ms

    def _open_engine(self) -> None:
        # Set in the thread: a caller that is cancelled meanwhile gets no result, and the engine is to be closed.
        self._engine = self._service.new_engine()

    def _oldest_needed(self, scan: TopicScan) -> Callable[[], int | None]:
        return lambda: oldest_needed_ms(scan.pushdown, self.engine.timestamp_ms)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Returns the result of `work`, run in a thread. Raises the reason if the statement was ended, and the error of
        a source in place of DuckDB's words for it."""
        self._must_go_on()
        self._thread = in_daemon(work)
        try:
            return await self._result(self._thread)
        except (StreamHouseError, Interrupted):
            self._must_go_on()
            if self.sources.error is not None:
                raise self.sources.error from None
            raise

    def _must_go_on(self) -> None:
        if self._ended_by.done():
            raise self._ended_by.result()

    async def _result(self, call: asyncio.Future[T]) -> T:
        """Returns the result of a call. Raises the reason if the statement is ended meanwhile. A caller that is
        cancelled leaves the end of the statement to the service."""
        # A caller that is cancelled does not cancel the call.
        await asyncio.wait((call, self._ended_by), return_when=asyncio.FIRST_COMPLETED)
        if not call.done() or call.cancelled():
            self._must_go_on()
        return call.result()

    async def end(self, reason: StreamHouseError) -> None:
        """Ends the statement wherever it is; its caller gets the reason at once."""
        if not self._ended_by.done():
            self._ended_by.set_result(reason)
        await self._release()

    async def _expire(self) -> None:
        await asyncio.sleep(max(0.0, self._deadline_s - time.monotonic()))
        await self.end(StatementTimeout(f"not done within {self._timeout_ms} ms", timeout_ms=self._timeout_ms))

    async def _release(self) -> None:
        """Ends look-ups, feeds, thread and instance, and gives the turn to the next statement. Idempotent."""
        if self._lookup is not None:
            await cancel_and_wait(self._lookup)
        await self.sources.close()
        abandoned_s = time.monotonic() + ABANDON_MS / 1000
        while self._thread is not None and not self._thread.done():
            if self._engine is not None:
                self._engine.interrupt()
            if self._service.is_closed and time.monotonic() > abandoned_s:
                if not self._is_abandoned:
                    log.error("a statement does not heed its interrupt; the service stops without it")
                    self._thread.add_done_callback(lambda _: self._drop())
                self._is_abandoned = True
                return
            await asyncio.wait((self._thread,), timeout=INTERRUPT_AGAIN_MS / 1000)
        if self._thread is not None and not self._thread.cancelled():
            self._thread.exception()  # seen: of a statement that was ended it is only the interrupt
        self._drop()

    def _drop(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()
        self._free_turn()


class OpenQuery:
    """A query whose caller takes the result batch by batch.

    Invariants: the query holds its turn from `begin` until its last batch was read, `close`, or the deadline. The batch
    after the next one is read ahead, so that a short result holds no turn while its caller takes it.
    """

    def __init__(self, check: Callable[[int, int], None]) -> None:
        self.began_s = time.monotonic()
        self.columns: list[tuple[str, str]] = []
        self._check = check
        self._run: _Run | None = None
        self._batches: Iterator[Any] = iter(())
        self._ahead: Any = None
        self._rows = self._size_bytes = 0
        self._is_closed = False

    async def begin(
        self,
        run: _Run,
        bound: BoundQuery,
        compute: Callable[[], Coroutine[Any, Any, tuple[list[tuple[str, str]], Iterator[Any]]]],
    ) -> None:
        """Begins the query in its turn, up to its first batch."""
        self._run = await run.__aenter__()
        await run.prepare(bound)
        self.columns, self._batches = await compute()
        self._ahead = await self._read()

    async def next(self) -> Any:
        """Returns the next `pyarrow.RecordBatch`, None at the end. An error ends the query, too."""
        batch, self._ahead = self._ahead, None
        if batch is not None:
            try:
                self._ahead = await self._read()
            except BaseException as error:
                await self.close(error)
                raise
        return batch

    async def _read(self) -> Any:
        run = self._run
        assert run is not None, "begun"
        batch = await run.in_thread(lambda: next(self._batches, None))
        if batch is None:
            await self.close()
            return None
        self._rows += batch.num_rows
        self._size_bytes += batch.nbytes
        self._check(self._rows, self._size_bytes)
        return batch

    async def close(self, error: BaseException | None = None) -> None:
        """Gives the turn back. `error`: the one that ended the query. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        run, self._run = self._run, None
        outcome = "done" if error is None else "cancelled" if isinstance(error, asyncio.CancelledError) else "failed"
        telemetry.statements.add(1, {"outcome": outcome})
        telemetry.statement_duration_ms.record(_elapsed_ms(self.began_s))
        if run is not None:
            await run.__aexit__()


def parse_any(text: str, *, parameters: bool = False) -> AnyStatement:
    """Returns the statement of a text, about jobs or not. Raises InvalidStatement."""
    found = parse_job_statement(text)
    return parse(text, parameters=parameters) if found is None else found


async def _within(began_s: float, timeout_ms: int, work: Coroutine[Any, Any, T]) -> T:
    """Returns the result of `work`. Raises StatementTimeout."""
    try:
        async with asyncio.timeout(max(0.0, began_s + timeout_ms / 1000 - time.monotonic())) as timeout:
            return await work
    except TimeoutError:
        if not timeout.expired():
            raise
        raise StatementTimeout(f"not done within {timeout_ms} ms", timeout_ms=timeout_ms) from None


def _limited(timeout_ms: int, setting: str, limit_ms: int) -> int:
    """Returns the time limit of a statement: the client's, or that of the setting; 0 for none. Raises
    InvalidArgument."""
    if limit_ms and timeout_ms > limit_ms:
        raise InvalidArgument(
            f"timeout_ms is {timeout_ms}, {setting} is {limit_ms}", field="timeout_ms", value=timeout_ms, limit=limit_ms
        )
    return timeout_ms or limit_ms


def _described(rows: Sequence[tuple[str, str, str]]) -> Any:
    names = ("column_name", "column_type", "comment")
    columns: dict[str, list[Any]] = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    return table_of(columns, dict.fromkeys(names, pa.string()))


def _comment(table: TableDefinition, name: str) -> str:
    column = table.column(name)
    if column is None:
        return ""
    return ", ".join(filter(None, ("PRIMARY KEY" if name in table.primary_key else "", _origin(table, column))))


def _origin(table: TableDefinition, column: TableColumn) -> str:
    if table.watermark is not None and column.name == table.watermark[0]:
        return f"WATERMARK AS {table.watermark[1]}"
    if column.metadata:
        return f"METADATA, {column.metadata} of the record"
    return f"AS {column.computed}" if column.computed else ""


def _done(what: str) -> Any:
    """Returns the result of a statement that has none: a row that says what was done."""
    return table_of({"status": [what]}, {"status": pa.string()})


def _elapsed_ms(began_s: float) -> int:
    return int((time.monotonic() - began_s) * 1000)
