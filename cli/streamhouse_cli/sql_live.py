"""Live queries on a terminal: the result as a table that changes in place.

Owns: the rows of the result as of now, the lines drawn last. Does not own: the query, the terminal's size.
Invariants: at most a screen of lines is drawn, at most DRAWS_PER_S times a second, and the last table stays. The rows
kept are those of the result; a result that only grows keeps a screen of rows.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from streamhouse_cli.failures import CliError
from streamhouse_cli.output import Output
from streamhouse_cli.sql_formats import Table, cells_of, row_count_text

if TYPE_CHECKING:
    import asyncio

    import pyarrow
    from streamhouse import LiveColumns, SqlResult

    from streamhouse_cli.sql_screen import Screen

DRAWS_PER_S = 10
# Of the time, so that a slow terminal or a large result leaves room for reading changes.
DRAWING_SHARE = 0.25
# A result that people look at has some dozens; this many take about 100 MB.
ROWS_MAX = 100_000
# Of a screen: header, rule, the line about rows that are not shown, counts, and the prompt below.
OTHER_LINES = 5

Row = tuple[str | None, ...]


class Rows(Protocol):
    """Result of a live query as of now."""

    def apply(self, batch: pyarrow.RecordBatch) -> None: ...
    def shown(self, count: int) -> tuple[Sequence[Row], int, int]: ...
    @property
    def count(self) -> int: ...


def rows_of(live: LiveColumns, schema: pyarrow.Schema, lines: int) -> Rows:
    """Returns the rows of a live query that has given no changes yet. `lines`: of the screen."""
    if not live.is_changelog:
        return NewestRows(lines)
    if live.key_columns:
        return KeyedRows(schema, live.key_columns)
    return AllRows()


class KeyedRows:
    """The newest row of each key, in the order of keys. A result too long for the screen shows its end if its first
    key is a time, as that of windows is, else its beginning."""

    def __init__(self, schema: pyarrow.Schema, key_columns: Sequence[str]) -> None:
        from pyarrow import types

        # Positions without `_op`.
        self._keys = [schema.names.index(name, 1) - 1 for name in key_columns]
        self._shows_end = types.is_temporal(schema.field(self._keys[0] + 1).type)
        self._rows: dict[Row, Row] = {}
        self._order: list[tuple[Any, Row]] = []

    @property
    def count(self) -> int:
        """Number of rows of the result."""
        return len(self._rows)

    def apply(self, batch: pyarrow.RecordBatch) -> None:
        """Applies changes. Raises CliError for a result of more than ROWS_MAX rows."""
        columns = [cells_of(column) for column in batch.columns[1:]]
        ranks = zip(*(_ranks(batch.column(at + 1), columns[at]) for at in self._keys), strict=True)
        for kind, rank, row in zip(batch.column(0).to_pylist(), ranks, zip(*columns, strict=True), strict=True):
            key = tuple(row[at] for at in self._keys)
            if kind in ("+I", "+U"):
                if key not in self._rows:
                    insort(self._order, (rank, key))
                self._rows[key] = row
            elif kind == "-D" and self._rows.pop(key, None) is not None:
                del self._order[bisect_left(self._order, (rank, key))]
        _check(len(self._rows))

    def shown(self, count: int) -> tuple[Sequence[Row], int, int]:
        """Returns at most `count` rows, and the numbers of rows before and behind them."""
        first = max(0, len(self._order) - count) if self._shows_end else 0
        found = self._order[first : first + count]
        return [self._rows[key] for _, key in found], first, len(self._order) - first - len(found)


class AllRows:
    """All rows of a result without a key, in the order in which they came."""

    def __init__(self) -> None:
        self._rows: dict[Row, int] = {}
        self.count = 0

    def apply(self, batch: pyarrow.RecordBatch) -> None:
        """Applies changes. Raises CliError for a result of more than ROWS_MAX rows."""
        rows = zip(*(cells_of(column) for column in batch.columns[1:]), strict=True)
        for kind, row in zip(batch.column(0).to_pylist(), rows, strict=True):
            change = 1 if kind in ("+I", "+U") else -1
            self.count += change
            count = self._rows.get(row, 0) + change
            if count:
                self._rows[row] = count
            else:
                self._rows.pop(row, None)
        _check(len(self._rows))

    def shown(self, count: int) -> tuple[Sequence[Row], int, int]:
        """Returns at most `count` rows, and the numbers of rows before and behind them."""
        found: list[Row] = []
        for row, times in self._rows.items():
            found += [row] * min(times, count - len(found))
            if len(found) == count:
                break
        return found, 0, self.count - len(found)


class NewestRows:
    """The last rows of a result that only grows. `lines`: more than are ever shown."""

    def __init__(self, lines: int) -> None:
        self._rows: deque[Row] = deque(maxlen=lines)
        self.count = 0

    def apply(self, batch: pyarrow.RecordBatch) -> None:
        """Adds rows."""
        self.count += batch.num_rows
        batch = batch.slice(max(0, batch.num_rows - (self._rows.maxlen or 0)))
        self._rows.extend(zip(*(cells_of(column) for column in batch.columns[1:]), strict=True))

    def shown(self, count: int) -> tuple[Sequence[Row], int, int]:
        """Returns at most `count` rows, and the numbers of rows before and behind them."""
        found = list(self._rows)[-count:]
        return found, self.count - len(found), 0


def _check(count: int) -> None:
    if count > ROWS_MAX:
        raise CliError(
            f"the result has more than {ROWS_MAX:,} rows, too many for a table on the screen; --format json writes "
            "its changes"
        )


def _ranks(column: pyarrow.Array, texts: Sequence[str | None]) -> list[tuple[Any, ...]]:
    """Returns the places of values in their order, nulls last."""
    from pyarrow import types

    values: Sequence[Any] = texts
    if not types.is_nested(column.type):
        try:
            values = column.to_pylist()
        except (ValueError, OverflowError, ArithmeticError):  # a time that Python's types do not have
            values = texts
    return [
        (2,) if value is None else (1,) if isinstance(value, float) and math.isnan(value) else (0, value)
        for value in values
    ]


# ---- drawing


class LiveTable:
    """Draws the result of a live query until it ends, and leaves the last table on the screen."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._output = Output(screen.descriptor)
        self._lines_drawn = 0
        self._change_count = 0

    async def show(
        self,
        result: SqlResult,
        batches: AsyncGenerator[pyarrow.RecordBatch, None],
        coming: asyncio.Future[pyarrow.RecordBatch | None],
    ) -> None:
        """Draws the result as its changes come, the first of which is `coming`. Raises the error that ends the
        query."""
        import asyncio  # here: --help loads this module

        from shruntime.tasks import cancel_and_wait

        assert result.live is not None and result.schema is not None, "a live query that has answered"
        schema = result.schema
        rows = rows_of(result.live, schema, self._screen.measured()[1])
        loop = asyncio.get_running_loop()
        is_drawn, next_s = False, loop.time()
        try:
            while True:
                wait_s = None if is_drawn else max(0.0, next_s - loop.time())
                await asyncio.wait((coming,), timeout=wait_s)
                if coming.done():
                    batch = coming.result()
                    if batch is None:
                        return
                    rows.apply(batch)
                    self._change_count += batch.num_rows
                    is_drawn = False
                    coming = asyncio.ensure_future(anext(batches, None))
                if not is_drawn and loop.time() >= next_s:
                    begun_s = loop.time()
                    await self._draw(schema, rows, "; Ctrl-C ends the query")
                    is_drawn, drawn_s = True, loop.time()
                    next_s = drawn_s + max(1 / DRAWS_PER_S, (drawn_s - begun_s) / DRAWING_SHARE)
        finally:
            await cancel_and_wait(coming)
            await self._draw(schema, rows, "")

    async def _draw(self, schema: pyarrow.Schema, rows: Rows, hint: str) -> None:
        columns, lines = self._screen.measured()
        frame = frame_of(schema, rows, max(1, lines - OTHER_LINES), styled=self._screen.styled)
        changes = f"{self._change_count:,} change{'' if self._change_count == 1 else 's'}"
        frame.append(f"({row_count_text(rows.count)}, {changes}{hint})")
        up = f"\x1b[{self._lines_drawn}F" if self._lines_drawn else ""
        # Line by line over the last table: nothing is blank in between.
        text = "".join(f"{_cut(line, columns)}\x1b[K\n" for line in frame)
        await self._output.write(f"{up}{text}\x1b[J".encode())
        self._lines_drawn = len(frame)


def frame_of(schema: pyarrow.Schema, rows: Rows, count: int, *, styled: bool) -> list[str]:
    """Returns the lines of the table: header, rule, at most `count` rows, and how many more there are."""
    shown, before, behind = rows.shown(count)
    fields = [schema.field(at) for at in range(1, len(schema))]
    cells: list[list[str | None]] = [[row[at] for row in shown] for at in range(len(fields))]
    head, rule, *lines = Table(styled).rows(fields, cells).decode().split("\n")[:-1]
    if before:
        lines.insert(0, f"… {row_count_text(before)} before")
    if behind:
        lines.append(f"… {row_count_text(behind)} more")
    return [head, rule, *lines]


def _cut(line: str, columns: int) -> str:
    """Returns the line, cut to the width of the screen: a line that wraps would be drawn over wrongly."""
    from rich.cells import cell_len, set_cell_size
    from rich.text import Text

    plain = Text.from_ansi(line).plain
    return line if cell_len(plain) <= columns else f"{set_cell_size(plain, columns - 1)}…"
