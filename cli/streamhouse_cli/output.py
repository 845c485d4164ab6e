"""Output of commands: tables for people, JSON for scripts, bytes for pipes."""

import json
import os
import select
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import click

from streamhouse_cli.failures import CliError

# rich folds tables to 80 columns when the output is not a terminal; scripts and logs want whole lines.
PIPE_WIDTH = 240
# A pipe that polls as writable takes this many bytes without blocking (PIPE_BUF, on Linux).
PIECE_BYTES = 4096
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, err: bool = False) -> None:
    """Prints rows under a title. A column named with a trailing `#` holds numbers: aligned right, without the `#`."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    class PipeConsole(Console):
        """rich would end the process with 1 when the reader of a pipe has gone."""

        def on_broken_pipe(self) -> None:
            raise  # the BrokenPipeError that is being handled

    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False
    )
    for column in columns:
        table.add_column(column.removesuffix("#"), justify="right" if column.endswith("#") else "left")
    for row in rows:
        table.add_row(*(Text(show(cell)) for cell in row))
    stream = sys.stderr if err else sys.stdout
    if stream is not None:  # stderr may be closed, and has only remarks about the result
        PipeConsole(file=stream, width=None if stream.isatty() else PIPE_WIDTH).print(table)


def confirm(question: str) -> None:
    """Asks on stderr. Raises CliError unless the answer is yes, KeyboardInterrupt."""
    if sys.stdin is None or sys.stderr is None:
        closed = "stdin" if sys.stdin is None else "stderr"
        raise CliError(f"{closed} is closed, so there is no terminal to ask; --yes is for scripts")
    try:
        confirmed = click.confirm(question, err=True)
    except click.Abort as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        click.echo(err=True)  # behind the question
        raise CliError("stdin ended before there was an answer, nothing was done; --yes is for scripts") from None
    if not confirmed:
        raise CliError("not confirmed, nothing was done")


def show(cell: object) -> str:
    """Returns a cell as people read it: digits grouped, nothing for None."""
    if cell is None:
        return ""
    if isinstance(cell, int) and not isinstance(cell, bool):
        return f"{cell:,}"
    return str(cell)


def show_bytes(size_bytes: int | None) -> str:
    """Returns a size with its unit: 1536 -> 1.5 KiB; nothing for None."""
    if size_bytes is None:
        return ""
    size, unit = float(size_bytes), 0
    while abs(size) >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.0f} B" if unit == 0 else f"{size:.1f} {_UNITS[unit]}"


def show_share(size_bytes: int, size_bytes_max: int) -> str:
    """Returns a size and its share: 12.0 MiB of 1.0 GiB (1 %); without a limit only the size."""
    if size_bytes_max <= 0:
        return show_bytes(size_bytes)
    return f"{show_bytes(size_bytes)} of {show_bytes(size_bytes_max)} ({100 * size_bytes / size_bytes_max:.0f} %)"


def show_span(duration_ms: int) -> str:
    """Returns a duration in its largest fitting unit: 8 s, 12 min, 3.5 h, 4.0 d."""
    seconds = max(0, duration_ms) / 1000
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} d"


def show_time(time_ms: int | None) -> str:
    """Returns milliseconds since 1970 as ISO 8601 in UTC; a time outside of the calendar stays a number."""
    from datetime import UTC, datetime, timedelta

    if time_ms is None:
        return ""
    try:
        moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=time_ms)
    except OverflowError:
        return f"{time_ms} ms"
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def plain(value: Any) -> Any:
    """Returns nested values in their JSON form: bytes as hexadecimal."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


class Output:
    """Writes to a file descriptor. A slow reader makes only the caller wait, not the event loop: group heartbeats and
    downloads go on while `less` shows the first page."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)

    async def write(self, data: bytes) -> None:
        """Writes all of `data`. Raises BrokenPipeError once the reader has gone, and OSError that names stdout for
        other errors, such as a full disk."""
        view = memoryview(data)
        while view:
            # Asked before each write, not set non-blocking: the descriptor's mode is shared with the shell and other
            # programs.
            if not self._poll.poll(0):
                await self._writable()
            try:
                written = os.write(self._descriptor, view[:PIECE_BYTES])
            except BrokenPipeError:
                raise
            except OSError as error:
                raise OSError(error.errno, error.strerror, "stdout") from error
            view = view[written:]

    async def _writable(self) -> None:
        import asyncio

        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        loop.add_writer(self._descriptor, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_writer(self._descriptor)
