"""streamhouse sql: statements over topics, from options, a file or stdin, or typed into a shell."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import click

from streamhouse_cli.failures import CliError
from streamhouse_cli.options import Number, bootstrap_option
from streamhouse_cli.output import Output
from streamhouse_cli.process import is_terminal, run
from streamhouse_cli.sql_formats import BINARY, FORMATS, new_format
from streamhouse_cli.sql_live import LiveTable
from streamhouse_cli.sql_running import (
    Write,
    checked_statements,
    has_styles,
    open_sql,
    redraws,
    statement_error,
    write_result,
)
from streamhouse_cli.sql_sources import read_source
from streamhouse_cli.sql_statements import Statement
from streamhouse_cli.sql_translate import translate


@click.group(short_help="Run SQL over topics, or open a shell.", invoke_without_command=True)
@click.option("-c", "--command", "texts", multiple=True, metavar="STATEMENT", help="Run this; may be repeated.")
@click.option("-f", "--file", "path", type=click.Path(), metavar="FILE", help="Run the statements of FILE; - is stdin.")
@click.option(
    "--format",
    "shape",
    type=click.Choice(FORMATS),
    default="table",
    show_default=True,
    help="json: an object per line. arrow: an Arrow IPC stream. parquet: a Parquet file.",
)
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False), metavar="FILE", help="Write results to FILE, once all are there."
)
@click.option(
    "--timeout-ms", type=Number(min=1), metavar="MS", help="End a statement that takes longer. Default: the server's."
)
@bootstrap_option
@click.pass_context
def sql(
    ctx: click.Context,
    texts: tuple[str, ...],
    path: str | None,
    shape: str,
    output: str | None,
    timeout_ms: int | None,
    bootstrap: str,
) -> None:
    """Run SQL statements over topics.

    Statements are separated by semicolons. They come from -c or -f; without both from stdin, or typed into a shell
    where stdin is a terminal. The first that fails ends the command with 1; Ctrl-C ends the running statement on the
    server, too.
    """
    if ctx.invoked_subcommand is not None:
        return
    if texts and path is not None:
        raise click.UsageError("-c and -f exclude each other")
    if not texts and path is None and is_terminal(sys.stdin) and is_terminal(sys.stdout):
        if output is not None or shape in BINARY:
            raise click.UsageError(f"{f'--format {shape}' if output is None else '--output'} needs -c or -f")
        from streamhouse_cli.sql_shell import open_shell

        run(lambda: open_shell(bootstrap, shape, timeout_ms))
        return
    if shape in BINARY and output is None and is_terminal(sys.stdout):
        raise CliError(f"--format {shape} writes bytes, not text: name a file with --output, or redirect stdout")
    name, sources = _sources(texts, path)
    statements = [statement for source in sources for statement in checked_statements(source, name)]
    if shape in BINARY and len(statements) != 1:
        raise CliError(f"--format {shape} holds the result of one statement, here are {len(statements)}")
    run(lambda: _run_all(bootstrap, statements, name, shape, output, timeout_ms))


sql.add_command(translate)


# ---- where statements come from


def _sources(texts: Sequence[str], path: str | None) -> tuple[str, Sequence[str]]:
    """Returns the name of the file for errors, empty for -c, and the texts to run."""
    if texts:
        return "", texts
    name, source = read_source(path or "-")
    return name, [source]


# ---- running


async def _run_all(
    bootstrap: str, statements: Sequence[Statement], name: str, shape: str, output: str | None, timeout_ms: int | None
) -> None:
    from shproto.errors import StreamHouseError

    from streamhouse_cli.sql_screen import Screen

    terminal = output is None and is_terminal(sys.stdout)
    styled = terminal and has_styles()
    draws = terminal and shape == "table" and redraws()

    def begin_live() -> None:
        if output is not None or shape == "parquet":
            what = f"--format {shape}" if output is None else "--output"
            raise CliError(f"{what} holds a whole result, and a live query has no end: redirect stdout, as json or csv")

    with _opened(output) as write:
        async with open_sql(bootstrap) as client:
            for statement in statements:
                result = client(statement.text, timeout_ms=timeout_ms)
                try:
                    live = LiveTable(Screen(descriptor=sys.stdout.fileno(), styled=styled)) if draws else None
                    form = new_format(shape, styled=styled, terminal=terminal)
                    await write_result(result, form, write, live=live, begin_live=begin_live)
                except StreamHouseError as error:
                    raise statement_error(error, statement, name, bootstrap) from error
                except NotImplementedError as error:  # of pyarrow's writers
                    raise CliError(f"--format {shape} has no type for a column of this result: {error}") from error


@contextmanager
def _opened(path: str | None) -> Iterator[Write]:
    """Yields a function that writes to the file, or to stdout if there is none. The file appears, or is replaced, once
    all was written; where something fails, nothing of it is left."""
    if path is None:
        yield Output(sys.stdout.fileno()).write
        return
    target = Path(path).resolve()  # a link stays, and its target is replaced
    if target.exists() and not target.is_file():  # a pipe or a device is written as it is
        with target.open("wb") as file:
            yield _writer(file)
        return
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    partial = Path(name)
    try:
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, _mode_of(target))
            yield _writer(file)
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _mode_of(target: Path) -> int:
    """Returns the mode of the file, or of a new file as the umask has it."""
    try:
        return stat.S_IMODE(target.stat().st_mode)
    except FileNotFoundError:
        umask = os.umask(0)
        os.umask(umask)
        return 0o666 & ~umask


def _writer(file: IO[bytes]) -> Write:
    async def write(data: bytes) -> None:
        file.write(data)

    return write
