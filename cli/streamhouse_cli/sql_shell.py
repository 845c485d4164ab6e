"""The shell of `streamhouse sql`: a prompt, statements up to a semicolon, commands with a backslash.

Owns: the choices of the user (format, expanded, timing), the statement that runs. Does not own: the connection, the
terminal, names for completion.
Invariants: Ctrl-C ends the running statement, on the server, too, and never the shell. An error is shown, and the next
statement can be typed; statements behind the failed one in the same input do not run.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import stat
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from shformat import MissingExtra
from shproto.errors import StreamHouseError
from shproto.rpc import being_cancelled

from streamhouse_cli.output import show_bytes
from streamhouse_cli.sql_formats import BINARY, FORMATS, Table, new_format
from streamhouse_cli.sql_live import LiveTable
from streamhouse_cli.sql_names import Names, completer, quoted_name
from streamhouse_cli.sql_running import (
    StatementError,
    checked_statements,
    has_styles,
    open_sql,
    redraws,
    statement_error,
    write_result,
)
from streamhouse_cli.sql_screen import PagerLeft, Screen, ShownResult, pager_command
from streamhouse_cli.sql_statements import Statement, is_complete

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import History
    from streamhouse import Sql, SqlStats

PROMPT = "streamhouse> "
CONTINUED = "         ..> "
# Thousands of statements. The oldest half goes when a shell finds more.
HISTORY_BYTES_MAX = 1024 * 1024

HELP = {
    "\\d": "tables and topics",
    "\\d NAME": "columns of a table",
    "\\dt": "tables and topics",
    "\\x [on|off]": "a line for each value instead of a row",
    "\\timing [on|off]": "time and cost behind each result",
    "\\format [NAME]": f"format of results: {', '.join(name for name in FORMATS if name not in BINARY)}",
    "\\?": "this help",
    "\\q": "leave, as Ctrl-D does",
}
COMMANDS = tuple(dict.fromkeys(line.split()[0] for line in HELP))
_READING = re.compile(r"\s*(?:select|with|values|from|show|describe|explain)\b", re.IGNORECASE)


async def open_shell(bootstrap: str, shape: str, timeout_ms: int | None) -> None:
    """Runs the shell on the terminal until the user leaves. Raises Unavailable if no SQL service can be reached."""
    from streamhouse import __version__

    async with open_sql(bootstrap) as sql:
        names = Names(sql)
        try:
            await names.load()
            session = new_session(names, open_history(history_path()))
            screen = Screen(
                descriptor=sys.stdout.fileno(), styled=has_styles(), pager=pager_command(), redraws=redraws()
            )
            await screen.print(f"StreamHouse {__version__} at {bootstrap}; \\? for help, \\q to leave")
            await Shell(sql, names, session, screen, shape, timeout_ms, bootstrap).run()
        finally:
            await names.close()


class Shell:
    """Reads inputs from the prompt and executes them."""

    def __init__(
        self,
        sql: Sql,
        names: Names,
        session: PromptSession[str],
        screen: Screen,
        shape: str = "table",
        timeout_ms: int | None = None,
        bootstrap: str = "",
    ) -> None:
        self._sql = sql
        self._names = names
        self._session = session
        self._screen = screen
        self._shape = shape
        self._timeout_ms = timeout_ms
        self._bootstrap = bootstrap
        self._is_expanded = False
        self._is_timed = True
        self._shown: ShownResult | None = None
        self._is_live = False

    async def run(self) -> None:
        """Runs until the user leaves, by \\q or at the end of the input."""
        while True:
            try:
                # Ctrl-C at the prompt comes as a key: signals stay with the process.
                text = await self._session.prompt_async(PROMPT, handle_sigint=False)
            except KeyboardInterrupt:
                continue
            except EOFError:
                return
            if text.strip().rstrip(";").lower() in ("\\q", "exit", "quit"):
                return
            await self.enter(text)

    async def enter(self, text: str) -> None:
        """Executes an input: a command, or statements in their order up to one that fails. Shows errors."""
        try:
            if text.lstrip().startswith("\\"):
                await self._command(text.strip())
            else:
                for statement in checked_statements(text):
                    if not await self._interruptible(self._execute(statement)):
                        if not self._is_live:  # which has no other end
                            await self._screen.print("interrupted")
                        return
        except click.ClickException as error:
            error.show()

    # ---- statements

    async def _interruptible(self, work: Coroutine[Any, Any, None]) -> bool:
        """Returns True once the work is done, False if Ctrl-C has ended it. Raises the errors of the work."""
        loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)

        def interrupt(*_: object) -> None:
            # In a pager with all rows Ctrl-C is the pager's own, such as the end of a search.
            if self._shown is None or not self._shown.is_read:
                loop.call_soon_threadsafe(task.cancel)

        before = signal.signal(signal.SIGINT, interrupt)
        try:
            await task
        except asyncio.CancelledError:
            if being_cancelled():  # the shell itself is to end
                raise
            return False
        finally:
            signal.signal(signal.SIGINT, before)
        return True

    async def _execute(self, statement: Statement) -> None:
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        form = new_format(self._shape, expanded=self._is_expanded, styled=self._screen.styled, terminal=True)
        result = self._sql(statement.text, timeout_ms=self._timeout_ms)
        self._is_live = False
        live = LiveTable(self._screen) if self._screen.redraws and isinstance(form, Table) else None
        try:
            async with self._screen.result() as self._shown:
                await write_result(result, form, self._shown.write, live=live, begin_live=self._begin_live)
                elapsed_s = loop.time() - begun_s  # without the time in the pager
        except PagerLeft:
            return
        except StreamHouseError as error:
            raise statement_error(error, statement, bootstrap=self._bootstrap) from error
        finally:
            self._shown = None
            if not _READING.match(statement.text):
                self._names.forget()
        if self._is_timed:
            await self._screen.print(cost_text(elapsed_s, result.stats))

    def _begin_live(self) -> None:
        self._is_live = True
        if self._shown is not None:
            self._shown.scroll()

    # ---- commands

    async def _command(self, text: str) -> None:
        name, _, argument = text.rstrip(";").partition(" ")
        argument = argument.strip()
        if name in ("\\d", "\\dt"):
            described = argument and name == "\\d"
            await self.enter(f"DESCRIBE {quoted_name(argument)}" if described else "SHOW TABLES")
        elif name == "\\x":
            self._is_expanded = _switched(self._is_expanded, name, argument)
            await self._screen.print(f"expanded display is {_on_off(self._is_expanded)}")
        elif name == "\\timing":
            self._is_timed = _switched(self._is_timed, name, argument)
            await self._screen.print(f"timing is {_on_off(self._is_timed)}")
        elif name == "\\format":
            if argument and (argument not in FORMATS or argument in BINARY):
                raise StatementError(f"\\format takes table, json or csv; {argument!r} needs -c or -f, if it is one")
            self._shape = argument or self._shape
            await self._screen.print(f"format is {self._shape}")
        elif name == "\\?":
            width = max(map(len, HELP))
            await self._screen.print("\n".join(f"{name:{width}}  {said}" for name, said in HELP.items()))
        else:
            raise StatementError(f"there is no command {name}; \\? lists those that are there")


def _switched(before: bool, name: str, argument: str) -> bool:
    if argument not in ("", "on", "off"):
        raise StatementError(f"{name} takes on or off, not {argument!r}")
    return argument == "on" if argument else not before


def _on_off(value: bool) -> str:
    return "on" if value else "off"


def cost_text(elapsed_s: float, stats: SqlStats | None) -> str:
    """Returns the line behind a result: the user's waiting time, and the records read for the result."""
    elapsed = f"{elapsed_s * 1000:.0f} ms" if elapsed_s < 1 else f"{elapsed_s:.2f} s"
    if stats is None or not stats.records_scanned:
        return f"time: {elapsed}"
    scanned = f"{stats.records_scanned:,} record{'' if stats.records_scanned == 1 else 's'} scanned"
    return f"time: {elapsed}; {scanned} ({show_bytes(stats.bytes_scanned)})"


# ---- the prompt


def new_session(names: Names, history: History, **options: Any) -> PromptSession[str]:
    """Returns the prompt: Enter ends an input at the semicolon, else begins a new line. `options`: more of
    PromptSession's. Raises MissingExtra."""
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.application import get_app
        from prompt_toolkit.filters import Condition
        from prompt_toolkit.lexers import PygmentsLexer
        from pygments.lexers.sql import PostgresLexer
    except ModuleNotFoundError as error:
        raise MissingExtra("the SQL shell", (error.name or "").partition(".")[0], "sql") from error

    return PromptSession(
        history=history,
        completer=completer(names, COMMANDS),
        lexer=PygmentsLexer(PostgresLexer),
        multiline=Condition(lambda: _goes_on(get_app().current_buffer.text)),
        prompt_continuation=CONTINUED,
        tempfile_suffix=".sql",
        enable_open_in_editor=True,
        **options,
    )


def _goes_on(text: str) -> bool:
    """Returns True if Enter begins another line of an input."""
    stripped = text.strip()
    return bool(stripped) and stripped[0] != "\\" and stripped not in ("exit", "quit") and not is_complete(text)


def history_path() -> Path:
    """Returns the file with the inputs of earlier sessions."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "streamhouse" / "sql_history"


def open_history(path: Path) -> History:
    """Returns the history in the file, which only its owner can read: statements may have secrets in them. Where a file
    cannot be kept, says so and returns a history of this session alone."""
    try:
        from prompt_toolkit.history import FileHistory, InMemoryHistory
    except ModuleNotFoundError as error:
        raise MissingExtra("the SQL shell", "prompt_toolkit", "sql") from error

    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # not /dev/null, to which some link it
                os.fchmod(file.fileno(), 0o600)
                _shorten(file)
    except OSError as error:
        click.echo(f"the history is not kept: {path}: {error.strerror}", err=True)
        return InMemoryHistory()
    return FileHistory(str(path))


def _shorten(file: Any) -> None:
    """Cuts a history that is too long at the beginning of one of its later entries."""
    data = file.read(2 * HISTORY_BYTES_MAX)
    if len(data) <= HISTORY_BYTES_MAX:
        return
    begin = data.find(b"\n# ", len(data) - HISTORY_BYTES_MAX // 2)
    file.seek(0)
    file.write(data[begin:] if begin >= 0 else b"")
    file.truncate()
