"""SQL over topics: statements run on the SQL services, and results come back as Arrow record batches.

Owns: the addresses of the SQL services, and which of them is next. Does not own: the language, which services parse.
Invariants: a statement is sent again only before its first response. A statement whose first response was lost is sent
again LOST_ANSWERS_MAX times at most, and only if it changes nothing. A result that is no longer read ends its statement
on the service.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

from shcluster.peers import Peers
from shformat import MissingExtra
from shproto.errors import Internal, InvalidArgument, Overloaded, StatementTimeout, StreamHouseError, Unavailable
from shproto.limits import RETRY_FIRST_MS, RETRY_MS_MAX
from shproto.rpc import Interceptors
from shproto.v1 import sql_pb2
from shruntime.tasks import Backoff
from shruntime.urls import addresses_of

from streamhouse.core.options import (
    check_request_timeout,
    check_retry_timeout,
    check_statement,
    check_statement_timeout,
)
from streamhouse.core.sync_mismatch import AsyncContext, AsyncIteration
from streamhouse.metadata import MetadataCache
from streamhouse.retries import Retries, retries_exhausted

if TYPE_CHECKING:
    import pandas
    import polars
    import pyarrow

# An admin's limits, with the same reasons.
REQUEST_TIMEOUT_MS = 10_000
RETRY_TIMEOUT_MS = 60_000
# A service that starts later than that is found late, a service that is gone is found by a failed call.
ADDRESSES_KEPT_MS = 30_000
# Enough for a service that was restarted. A statement that ends its service must not end all services in turn.
LOST_ANSWERS_MAX = 1

# Entry of a schema's metadata; see docs/sql.md.
LIVE_METADATA = b"streamhouse.live"

_BLANK = r"(?:\s|\(|--[^\n]*(?:\n|\Z)|/\*.*?\*/)*"
_READS = re.compile(
    rf"{_BLANK}(?:select|with|values|from|table|show|describe|desc|explain)\b", re.IGNORECASE | re.DOTALL
)
_INSERTS = re.compile(r"\binsert\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class SqlStats:
    """Cost of a statement: rows of its result; records decoded, without those that push-down left out; bytes of encoded
    batches read; time on the service."""

    rows: int
    records_scanned: int
    bytes_scanned: int
    elapsed_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveColumns:
    """Columns of a live query: `_op` comes first. key_columns: those that identify a row, none if there are none.
    is_changelog: rows may be taken back."""

    key_columns: tuple[str, ...]
    is_changelog: bool


class Sql(AsyncContext):
    """Runs SQL statements over topics. An async context manager; `sql(statement)` returns the result of a statement.

    Several SQL services take statements in turn; a service that does not answer is passed over. request_timeout_ms:
    limit of a single question to the coordinator, and of the wait for an overdue service beyond the time limit of a
    statement. retry_timeout_ms: how long a statement is tried again while no server answers or all servers are
    overloaded; after that reading the result raises Unavailable or Overloaded. Needs the extra `sql`.
    """

    def __init__(
        self,
        bootstrap: str | Sequence[str],
        *,
        request_timeout_ms: int = REQUEST_TIMEOUT_MS,
        retry_timeout_ms: int = RETRY_TIMEOUT_MS,
        telemetry: Interceptors | None = None,
    ) -> None:
        check_request_timeout(request_timeout_ms)
        check_retry_timeout(retry_timeout_ms)
        addresses = addresses_of(bootstrap)
        self._request_timeout_ms = request_timeout_ms
        self._retry_timeout_ms = retry_timeout_ms
        # The connections do not repeat calls by themselves: a statement may take longer to answer than it may be
        # retried.
        self._peers = Peers(addresses, request_timeout_ms, telemetry)
        self._metadata = MetadataCache(self._peers)
        self._retries = Retries("retry_timeout_ms", retry_timeout_ms, addresses)
        self._addresses: tuple[str, ...] = ()
        self._addresses_end_ms = 0.0
        self._next = random.randrange(1 << 16)  # clients begin with different services

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections, which ends all statements that still run."""
        await self._metadata.close()
        await self._peers.close()

    def __call__(self, statement: str, *, timeout_ms: int | None = None) -> SqlResult:
        """Returns the result of a statement, which runs once the result is read. timeout_ms: how long the statement may
        take; None: the limit of the server. Raises InvalidArgument, MissingExtra."""
        check_statement(statement)
        check_statement_timeout(timeout_ms)
        _pyarrow()  # here: a statement must not run for nothing
        return SqlResult(self, statement, timeout_ms)

    async def _responses(self, statement: str, timeout_ms: int | None) -> AsyncGenerator[sql_pb2.ExecuteResponse, None]:
        request = sql_pb2.ExecuteRequest(statement=statement, timeout_ms=timeout_ms or 0)
        limit = _WaitLimit(timeout_ms, self._request_timeout_ms)
        stream, first = await self._begin(request, limit)
        async with aclosing(stream):
            response: sql_pb2.ExecuteResponse | None = first
            while response is not None:
                yield response
                response = await limit.next_of(stream)

    async def _begin(
        self, request: sql_pb2.ExecuteRequest, limit: _WaitLimit
    ) -> tuple[AsyncGenerator[sql_pb2.ExecuteResponse, None], sql_pb2.ExecuteResponse]:
        """Returns the stream of responses and the first of them. Raises the refusal of the service; Unavailable or
        Overloaded once retry_timeout_ms is over."""
        loop, backoff, lost_count = asyncio.get_running_loop(), Backoff(RETRY_FIRST_MS, RETRY_MS_MAX), 0
        reads = _only_reads(request.statement)
        deadline_s = loop.time() + self._retry_timeout_ms / 1000
        while True:
            failures: list[StreamHouseError] = []
            for address in await self._in_turn():
                stream = cast(
                    "AsyncGenerator[sql_pb2.ExecuteResponse, None]", self._peers.sql(address).execute(request)
                )
                try:
                    first = await limit.next_of(stream)
                except StreamHouseError as error:
                    if not error.retriable or not (reads or _is_certainly_undone(error)):
                        raise
                    if isinstance(error, Unavailable) and error.maybe_done:
                        lost_count += 1
                        if lost_count > LOST_ANSWERS_MAX:
                            raise
                    failures.append(error)
                else:
                    if first is None:
                        raise Internal(f"{address} answered a statement without a schema")
                    return stream, first
            last = failures[-1]
            self._addresses = ()  # a service that does not answer may have another address by now
            if all(isinstance(error, Unavailable) and error.permanent for error in failures):
                raise last
            wait_s = (max(error.retry_after_ms for error in failures) + backoff.next_ms()) / 1000
            if loop.time() + wait_s >= deadline_s:
                raise retries_exhausted(
                    "no SQL service took the statement", "retry_timeout_ms", self._retry_timeout_ms, last
                )
            await asyncio.sleep(wait_s)

    async def _in_turn(self) -> tuple[str, ...]:
        """Returns the addresses of the SQL services, in an order that begins with the next in turn. Raises
        Unavailable if there are none."""
        now_ms = asyncio.get_running_loop().time() * 1000
        if not self._addresses or now_ms >= self._addresses_end_ms:
            self._addresses = await self._retries.run(self._metadata.sql_addresses)
            self._addresses_end_ms = now_ms + ADDRESSES_KEPT_MS
        if not self._addresses:
            error = Unavailable(
                "no SQL service runs: `streamhouse serve` has one where the extra sql is installed, and a "
                "distributed platform needs a `streamhouse sql-worker`"
            )
            error.maybe_done, error.permanent = False, True
            raise error
        self._next += 1
        first = self._next % len(self._addresses)
        return self._addresses[first:] + self._addresses[:first]


class _WaitLimit:
    """Time that the client waits for responses of a statement, all waits together: the limit of the statement, which
    the service keeps, and `grace_ms` for a service that hangs. The time in which the application works on a batch does
    not count."""

    def __init__(self, timeout_ms: int | None, grace_ms: int) -> None:
        self._timeout_ms = timeout_ms
        self._left_s = None if timeout_ms is None else (timeout_ms + grace_ms) / 1000

    async def next_of(self, stream: AsyncIterator[sql_pb2.ExecuteResponse]) -> sql_pb2.ExecuteResponse | None:
        """Returns the next response; None at the end. Raises StatementTimeout once the time is over."""
        if self._left_s is None:
            return await anext(stream, None)
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        try:
            async with asyncio.timeout(self._left_s) as timeout:
                return await anext(stream, None)
        except TimeoutError as error:
            if not timeout.expired():
                raise
            raise StatementTimeout(
                f"the service neither answered nor ended the statement after timeout_ms = {self._timeout_ms}",
                timeout_ms=self._timeout_ms,
            ) from error
        finally:
            self._left_s -= loop.time() - begun_s


class SqlResult(AsyncIteration):
    """Result of a statement. `async for` yields pyarrow.RecordBatches while the statement runs; a result is read once,
    and the statement ends with the iteration."""

    def __init__(self, sql: Sql, statement: str, timeout_ms: int | None) -> None:
        self._sql = sql
        self._timeout_ms = timeout_ms
        self._is_begun = False
        self.statement = statement
        self.schema: pyarrow.Schema | None = None
        """Columns of the result, from the first response on."""
        self.live: LiveColumns | None = None
        """Columns of a live query (EMIT), from the first response on; None of other statements."""
        self.stats: SqlStats | None = None
        """Cost of the statement, once the whole result was read."""

    def __aiter__(self) -> AsyncGenerator[pyarrow.RecordBatch, None]:
        """Runs the statement, and returns its batches, none of them empty. Raises InvalidArgument the second time."""
        if self._is_begun:
            raise InvalidArgument(
                "this result was read already: run the statement again", field="result", value=self.statement
            )
        self._is_begun = True
        # Not kept here: the last reference ends with the `async for` that is left, and closes the generator.
        return self._batches()

    async def _batches(self) -> AsyncGenerator[pyarrow.RecordBatch, None]:
        async with aclosing(self._sql._responses(self.statement, self._timeout_ms)) as responses:
            async for response in responses:
                for batch in self._decoded(response):
                    if batch.num_rows:
                        yield batch
                if response.HasField("stats"):
                    self.stats = SqlStats(
                        rows=response.stats.rows,
                        records_scanned=response.stats.records_scanned,
                        bytes_scanned=response.stats.bytes_scanned,
                        elapsed_ms=response.stats.elapsed_ms,
                    )

    def _decoded(self, response: sql_pb2.ExecuteResponse) -> list[pyarrow.RecordBatch]:
        """Returns the batches of a response. Raises Internal if the response is damaged, or has other columns than the
        responses before."""
        if not response.arrow_stream:
            return []
        arrow = _pyarrow()
        try:
            with arrow.ipc.open_stream(response.arrow_stream) as reader:
                schema, batches = reader.schema, list(reader)
        except (arrow.ArrowInvalid, OSError) as error:
            raise Internal(f"a response of the SQL service is no Arrow stream: {error}") from error
        if self.schema is None:
            self.schema, self.live = schema, _live_columns(schema)
        elif not schema.equals(self.schema):
            raise Internal(f"the SQL service changed the columns of a result from {self.schema} to {schema}")
        return batches

    async def to_arrow(self) -> pyarrow.Table:
        """Runs the statement, and returns the whole result as a pyarrow.Table. Raises InvalidArgument for a live
        query."""
        batches = []
        async with aclosing(aiter(self)) as found:
            async for batch in found:
                if self.live is not None:
                    raise InvalidArgument(
                        "the result of a live query has no end: read its changes by `async for`",
                        field="statement",
                        value=self.statement,
                    )
                batches.append(batch)
        if self.schema is None:
            raise Internal("the SQL service sent no schema")
        return _pyarrow().Table.from_batches(batches, self.schema)

    async def to_pylist(self) -> list[dict[str, Any]]:
        """Runs the statement, and returns each row as a dict by the names of the columns. Raises InvalidArgument if two
        columns have the same name, as a dict would lose one of them."""
        table = await self.to_arrow()
        twice = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
        if twice:
            raise InvalidArgument(
                f"two columns of the result are named {twice[0]!r}: name them with AS", field="column", value=twice[0]
            )
        rows: list[dict[str, Any]] = table.to_pylist()
        return rows

    async def to_pandas(self) -> pandas.DataFrame:
        """Runs the statement, and returns the whole result as a pandas.DataFrame. Raises ModuleNotFoundError without
        pandas."""
        _require("pandas", "to_pandas()")
        return (await self.to_arrow()).to_pandas()

    async def to_polars(self) -> polars.DataFrame:
        """Runs the statement, and returns the whole result as a polars.DataFrame. Raises ModuleNotFoundError without
        polars."""
        module = _require("polars", "to_polars()")
        return cast("polars.DataFrame", module.from_arrow(await self.to_arrow()))


def _live_columns(schema: pyarrow.Schema) -> LiveColumns | None:
    """Returns the entry of the service in the schema. Raises Internal if it is damaged."""
    entry = (schema.metadata or {}).get(LIVE_METADATA)
    if entry is None:
        return None
    try:
        found = json.loads(entry)
        return LiveColumns(key_columns=tuple(map(str, found["key_columns"])), is_changelog=bool(found["is_changelog"]))
    except (ValueError, TypeError, KeyError) as error:
        raise Internal(f"the SQL service said of a live query {entry[:200]!r}") from error


def _only_reads(statement: str) -> bool:
    """Returns True if a statement certainly changes nothing, so that it may run twice."""
    return _READS.match(statement) is not None and _INSERTS.search(statement) is None


def _is_certainly_undone(error: StreamHouseError) -> bool:
    """Returns True if the service has not begun the statement: it never got it, or had no room for it. A service that
    stops may have done it."""
    return not error.maybe_done if isinstance(error, Unavailable) else isinstance(error, Overloaded)


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ModuleNotFoundError as error:
        raise MissingExtra("Sql", "pyarrow", "sql") from error
    return pyarrow


def _require(package: str, user: str) -> Any:
    from importlib import import_module

    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        text = f"{user} needs {package}, which is not installed: pip install {package}"
        raise ModuleNotFoundError(text, name=package) from error
