"""SQL for plain code: `streamhouse.Sql` without `await`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from shproto.rpc import Interceptors

from streamhouse import sql
from streamhouse.background import BACKGROUND
from streamhouse.core.sync_mismatch import PlainContext, PlainIteration

if TYPE_CHECKING:
    import pandas
    import polars
    import pyarrow


class Sql(PlainContext):
    """Runs SQL statements over topics; `streamhouse.Sql` explains options and results."""

    def __init__(
        self,
        bootstrap: str | Sequence[str],
        *,
        request_timeout_ms: int = sql.REQUEST_TIMEOUT_MS,
        retry_timeout_ms: int = sql.RETRY_TIMEOUT_MS,
        telemetry: Interceptors | None = None,
    ) -> None:
        self._inner = sql.Sql(
            bootstrap,
            request_timeout_ms=request_timeout_ms,
            retry_timeout_ms=retry_timeout_ms,
            telemetry=telemetry,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __call__(self, statement: str, *, timeout_ms: int | None = None) -> SqlResult:
        """Returns the result of a statement, which runs once the result is read. timeout_ms: how long the statement may
        take; None: the limit of the server. Raises InvalidArgument, MissingExtra."""
        return SqlResult(self._inner(statement, timeout_ms=timeout_ms))

    def close(self) -> None:
        """Closes the connections, which ends all statements that still run."""
        BACKGROUND.run(self._inner.close())


class SqlResult(PlainIteration):
    """Result of a statement. Iterating yields pyarrow.RecordBatches while the statement runs; a result is read once,
    and the statement ends with the iteration."""

    def __init__(self, inner: sql.SqlResult) -> None:
        self._inner = inner

    @property
    def statement(self) -> str:
        """Text of the statement."""
        return self._inner.statement

    @property
    def schema(self) -> pyarrow.Schema | None:
        """Columns of the result, from the first response on."""
        return self._inner.schema

    @property
    def live(self) -> sql.LiveColumns | None:
        """Columns of a live query (EMIT), from the first response on; None of other statements."""
        return self._inner.live

    @property
    def stats(self) -> sql.SqlStats | None:
        """Cost of the statement, once the whole result was read."""
        return self._inner.stats

    def __iter__(self) -> Iterator[pyarrow.RecordBatch]:
        """Runs the statement, and returns its batches, none of them empty. Raises InvalidArgument the second time."""
        return _plain(aiter(self._inner))

    def to_arrow(self) -> pyarrow.Table:
        """Runs the statement, and returns the whole result as a pyarrow.Table."""
        return BACKGROUND.run(self._inner.to_arrow())

    def to_pylist(self) -> list[dict[str, Any]]:
        """Runs the statement, and returns each row as a dict by the names of the columns. Raises InvalidArgument if two
        columns have the same name."""
        return BACKGROUND.run(self._inner.to_pylist())

    def to_pandas(self) -> pandas.DataFrame:
        """Runs the statement, and returns the whole result as a pandas.DataFrame. Raises ModuleNotFoundError without
        pandas."""
        return BACKGROUND.run(self._inner.to_pandas())

    def to_polars(self) -> polars.DataFrame:
        """Runs the statement, and returns the whole result as a polars.DataFrame. Raises ModuleNotFoundError without
        polars."""
        return BACKGROUND.run(self._inner.to_polars())


def _plain(batches: AsyncGenerator[pyarrow.RecordBatch, None]) -> Iterator[pyarrow.RecordBatch]:
    # A loop that is left drops this generator, and with it the last reference to `batches`, which asyncio closes in
    # its own thread. An interrupt of the wait cancels the statement.
    async def next_batch() -> pyarrow.RecordBatch | None:
        return await anext(batches, None)

    while (batch := BACKGROUND.run(next_batch())) is not None:
        yield batch
