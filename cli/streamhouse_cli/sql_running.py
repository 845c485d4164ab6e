"""What `streamhouse sql` and its shell do alike: connect, write rows as they come, show the place of an error."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import IO, TYPE_CHECKING, Any

import click

from streamhouse_cli.failures import CliError, explain
from streamhouse_cli.options import retry_timeout_ms
from streamhouse_cli.sql_formats import Format
from streamhouse_cli.sql_statements import Statement, UnfinishedStatement, excerpt, statements_of

if TYPE_CHECKING:
    from shproto.errors import StreamHouseError
    from streamhouse import Sql, SqlResult

    from streamhouse_cli.sql_live import LiveTable

Write = Callable[[bytes], Awaitable[None]]
# A query's first response comes without rows, often long before the first change of a live query.
ANSWER_POLL_S = 0.1

# Services begin messages about a place with the place, which is shown here in the words of the file.
_PLACE = re.compile(r"line \d+, column \d+: ")


class StatementError(CliError):
    """An error in a statement; below it the line of the statement and a caret under the place."""

    def __init__(self, text: str, lines: Sequence[str] = ()) -> None:
        super().__init__(text)
        self.lines = lines

    def show(self, file: IO[Any] | None = None) -> None:
        super().show(file)
        for line in self.lines:
            click.echo(f"  {line}", file=file, err=True)


def checked_statements(source: str, name: str = "") -> list[Statement]:
    """Returns the statements of a text, of the file `name` if that is not empty. Raises StatementError."""
    try:
        return statements_of(source)
    except UnfinishedStatement as error:
        lines = excerpt(source, error.line, error.column)
        raise StatementError(f"{_place_text(name, error.line, error.column)}{error}", lines) from error


def _place_text(name: str, line: int, column: int) -> str:
    """Returns the beginning of an error about a place, in the file `name` if that is not empty."""
    return f"{name}:{line}:{column}: " if name else f"line {line}, column {column}: "


def statement_error(error: StreamHouseError, statement: Statement, name: str = "", bootstrap: str = "") -> CliError:
    """Returns an error of a statement with its place in the file, as far as the service knew the place."""
    text = explain(error, {"bootstrap": bootstrap}) or str(error)
    line, column = (
        int(value) if (value := error.details.get(key, "")).isdecimal() else 0 for key in ("line", "column")
    )
    if line < 1 or column < 1:
        is_of_statement = name and not error.retriable
        return StatementError(f"{_place_text(name, *statement.place())}{text}" if is_of_statement else text)
    text = _PLACE.sub("", text, count=1)
    return StatementError(f"{_place_text(name, *statement.place(line, column))}{text}", statement.excerpt(line, column))


# ---- results


def open_sql(bootstrap: str) -> Sql:
    """Returns a client with the command's --retry-timeout-ms."""
    from streamhouse import Sql

    return Sql(bootstrap, retry_timeout_ms=retry_timeout_ms())


async def write_result(
    result: SqlResult,
    form: Format,
    write: Write,
    *,
    live: LiveTable | None = None,
    begin_live: Callable[[], None] = lambda: None,
) -> None:
    """Runs the statement of a result, and writes its rows as they come; of a live query its changes, or, with `live`,
    the table that they make. `begin_live` is called before the first of them."""
    import asyncio  # here: --help loads this module

    from shruntime.tasks import cancel_and_wait

    async with aclosing(aiter(result)) as batches:
        # Whether the query is live is known before it has changes.
        first = asyncio.ensure_future(anext(batches, None))
        try:
            while result.schema is None and not first.done():
                await asyncio.wait((first,), timeout=ANSWER_POLL_S)
            if result.live is not None:
                begin_live()
                if live is not None:
                    await live.show(result, batches, first)
                    return
            batch = await first
        finally:
            await cancel_and_wait(first)
        while batch is not None:
            await write(form.batch(batch))
            batch = await anext(batches, None)
    if result.schema is not None:
        await write(form.end(result.schema))


def redraws() -> bool:
    """Returns True if stdout is a terminal on which a table can change in place."""
    from rich.console import Console

    console = Console()
    return console.is_terminal and not console.is_dumb_terminal


def has_styles() -> bool:
    """Returns True if stdout is a terminal that shows bold and dim text, and NO_COLOR is not set."""
    from rich.console import Console

    return Console().color_system is not None
