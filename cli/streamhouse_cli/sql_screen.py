"""Results on a terminal: printed, or shown by a pager where they are larger than the screen.

Owns: the lines of a result that are held back, the pager's process. Does not own: the terminal.
Invariants: at most a screen of lines is held back, and for HOLD_S at most. The pager's input is bounded by its pipe: a
pager that does not read makes the result wait.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from streamhouse_cli.output import Output

# Rows that trickle are shown after this time, and then scroll: a pager cannot be begun behind printed lines.
HOLD_S = 1.0
# Colours as they are, long lines cut and scrolled sideways, nothing cleared at the end.
LESS_OPTIONS = "RSX"
COLUMNS, LINES = 80, 24
_STYLES = re.compile(r"\x1b\[[0-9;]*m")


class PagerLeft(Exception):
    """The user has left the pager: no more rows are wanted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Screen:
    """A terminal. `pager`: the command that shows long results; empty: none. `size`: (columns, lines) in place of
    the terminal's own. `redraws`: the terminal moves its cursor up, so that tables can change in place."""

    descriptor: int
    styled: bool = False
    pager: str = ""
    size: tuple[int, int] | None = None
    redraws: bool = False

    def measured(self) -> tuple[int, int]:
        """Returns the columns and lines of the terminal as of now."""
        columns, lines = self.size or os.get_terminal_size(self.descriptor)
        return columns or COLUMNS, lines or LINES  # a terminal that nobody has told its size says 0

    def result(self) -> ShownResult:
        """Returns a writer of one result, a context manager."""
        columns, lines = self.measured() if self.pager else (0, 0)
        return ShownResult(self.descriptor, self.pager, columns, lines)

    async def print(self, text: str) -> None:
        """Writes a line."""
        await Output(self.descriptor).write(f"{text}\n".encode())


def pager_command() -> str:
    """Returns the command of $PAGER, or less if it is installed; empty for no pager, as an empty $PAGER asks for."""
    named = os.environ.get("PAGER")
    if named is None:
        return "less" if shutil.which("less") else ""
    return named.strip()


class ShownResult:
    """Writes a result; begins the pager once the result is larger than the screen."""

    def __init__(self, descriptor: int, pager: str, columns: int, lines: int) -> None:
        self._output = Output(descriptor)
        self._descriptor = descriptor
        self._pager = pager
        self._columns = columns
        self._lines_max = lines - 2  # the prompt stands below the result
        self._held = b""
        self._is_holding = bool(pager)
        self._release: asyncio.TimerHandle | None = None
        self._process: asyncio.subprocess.Process | None = None
        self.is_read = False
        """True once all rows are in the pager, and the user reads them."""

    async def __aenter__(self) -> Self:
        return self

    async def write(self, data: bytes) -> None:
        """Writes a part of the result. Raises PagerLeft once the user has left the pager."""
        if self._process is not None:
            await self._page(data)
        elif not self._is_holding:
            held, self._held = self._held, b""
            await self._output.write(held + data)
        else:
            self._held += data
            if self._is_large():
                await self._begin_pager()
            elif self._release is None and self._held:
                self._release = asyncio.get_running_loop().call_later(HOLD_S, self._let_go)

    def scroll(self) -> None:
        """Shows the rows as they come, and no pager: the result has no end."""
        self._stop_timer()
        self._let_go()

    def _is_large(self) -> bool:
        if self._held.count(b"\n") > self._lines_max:
            return True
        from rich.cells import cell_len

        lines = _STYLES.sub("", self._held.decode(errors="replace")).split("\n")
        return any(cell_len(line) > self._columns for line in lines)

    def _let_go(self) -> None:
        """Prints the lines held back, at most a screen, and from then on all others as they come."""
        self._is_holding = False
        held, self._held = self._held, b""
        os.write(self._descriptor, held)

    async def _begin_pager(self) -> None:
        self._is_holding = False
        self._stop_timer()
        environ = os.environ if "LESS" in os.environ else os.environ | {"LESS": LESS_OPTIONS}
        self._process = await asyncio.create_subprocess_shell(
            self._pager, stdin=asyncio.subprocess.PIPE, stdout=self._descriptor, env=environ
        )
        held, self._held = self._held, b""
        await self._page(held)

    async def _page(self, data: bytes) -> None:
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(data)
            await self._process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError) as error:
            raise PagerLeft from error

    def _stop_timer(self) -> None:
        if self._release is not None:
            self._release.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Prints the lines held back, or waits for the user to leave the pager."""
        self._stop_timer()
        if self._process is None:
            await self._output.write(self._held)
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        self.is_read = True
        try:
            await self._process.wait()
        except asyncio.CancelledError:  # the shell ends, and a pager without it would go on to read keys
            self._process.terminate()
            await self._process.wait()
            raise
