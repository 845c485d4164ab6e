"""Live queries of streamhouse sql: tables that change in place on a terminal, changes in pipes."""

import asyncio
import contextlib
import datetime
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pytest
from shproto.v1 import sql_pb2
from streamhouse import LiveColumns
from streamhouse_cli import sql_live
from streamhouse_cli.failures import CliError
from streamhouse_cli.sql_live import AllRows, KeyedRows, NewestRows, frame_of, rows_of

from client.tests.sql_service import PlainPlatform, arrow_stream, plain_platform

PATIENCE_S = 60
LIVE = "SELECT carrier, count(*) AS n FROM flights GROUP BY carrier EMIT CHANGES"
MAIN = "import sys; sys.argv[0] = 'streamhouse'; from streamhouse_cli import main; main(prog_name='streamhouse')"
BY_CARRIER = LiveColumns(key_columns=("carrier",), is_changelog=True)


def changes(live: LiveColumns = BY_CARRIER, **columns: list) -> pa.RecordBatch:
    described = {"key_columns": live.key_columns, "is_changelog": live.is_changelog}
    return pa.record_batch(columns, metadata={"streamhouse.live": json.dumps(described)})


FIRST = changes(_op=["+I", "+I"], carrier=["UA", "AA"], n=[2, 1])
SECOND = changes(_op=["-U", "+U", "-D", "+I"], carrier=["UA", "UA", "AA", None], n=[2, 3, 1, 7])


def result_of(*batches: pa.RecordBatch, live: LiveColumns = BY_CARRIER, lines: int = 24):
    rows = rows_of(live, batches[0].schema, lines)
    for batch in batches:
        rows.apply(batch)
    return rows


def lines_of(rows, schema: pa.Schema, count: int = 20) -> list[str]:
    return frame_of(schema, rows, count, styled=False)


# ---- the result of changes


def test_a_result_with_a_key_has_its_newest_rows_in_order() -> None:
    rows = result_of(FIRST)
    assert lines_of(rows, FIRST.schema) == ["carrier  n", "──────────", "AA       1", "UA       2"]
    rows.apply(SECOND)
    assert rows.count == 2
    assert lines_of(rows, FIRST.schema)[2:] == ["UA       3", "NULL     7"]


def test_numbers_and_times_are_in_their_own_order() -> None:
    live = LiveColumns(key_columns=("n",), is_changelog=True)
    batch = changes(live, _op=["+I"] * 4, n=[10, 9, None, -1])
    assert lines_of(result_of(batch, live=live), batch.schema)[2:] == ["  -1", "   9", "  10", "NULL"]
    batch = changes(live, _op=["+I"] * 3, n=[1.5, float("nan"), -0.5])
    assert lines_of(result_of(batch, live=live), batch.schema)[2:] == ["-0.5", " 1.5", " NaN"]


def test_lists_as_keys_have_an_order_too() -> None:
    live = LiveColumns(key_columns=("k",), is_changelog=True)
    batch = changes(live, _op=["+I", "+I", "-D"], k=[[2], [1, 2], [2]])
    assert lines_of(result_of(batch, live=live), batch.schema)[2:] == ["[1,2]"]


def test_a_result_longer_than_the_screen_shows_its_beginning_or_its_newest_windows() -> None:
    batch = changes(_op=["+I"] * 5, carrier=list("edcba"), n=[1] * 5)
    assert lines_of(result_of(batch), batch.schema, 2)[2:] == ["a        1", "b        1", "… 3 rows more"]
    live = LiveColumns(key_columns=("at",), is_changelog=True)
    days = [datetime.date(2013, 1, day) for day in (1, 3, 2)]
    batch = changes(live, _op=["+I"] * 3, at=days)
    found = lines_of(result_of(batch, live=live), batch.schema, 1)[2:]
    assert found == ["… 2 rows before", "2013-01-03"]


def test_a_result_without_a_key_has_all_its_rows() -> None:
    live = LiveColumns(key_columns=(), is_changelog=True)
    rows = result_of(changes(live, _op=["+I"] * 3, n=[1, 1, 2]), live=live)
    assert isinstance(rows, AllRows)
    batch = changes(live, _op=["-D", "-D", "+I"], n=[1, 2, 3])
    rows.apply(batch)
    assert rows.count == 2 and lines_of(rows, batch.schema)[2:] == ["1", "3"]
    assert lines_of(rows, batch.schema, 1)[2:] == ["1", "… 1 row more"]


def test_a_result_that_only_grows_shows_its_newest_rows_and_keeps_no_others() -> None:
    live = LiveColumns(key_columns=(), is_changelog=False)
    batch = changes(live, _op=["+I"] * 1000, n=list(range(1000)))
    rows = result_of(batch, batch, live=live, lines=10)
    assert isinstance(rows, NewestRows) and len(rows._rows) == 10
    assert rows.count == 2000
    assert lines_of(rows, batch.schema, 2)[2:] == ["… 1,998 rows before", "998", "999"]


@pytest.mark.parametrize("keys", [("n",), ()])
def test_a_result_that_nobody_can_look_at_is_an_error(keys: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql_live, "ROWS_MAX", 10)
    live = LiveColumns(key_columns=keys, is_changelog=True)
    with pytest.raises(CliError, match="more than 10 rows, too many for a table on the screen"):
        result_of(changes(live, _op=["+I"] * 11, n=list(range(11))), live=live)


def test_a_line_wider_than_the_screen_is_cut() -> None:
    assert sql_live._cut("\x1b[1mabc\x1b[0m", 3) == "\x1b[1mabc\x1b[0m"
    assert sql_live._cut("\x1b[1mabcd\x1b[0m", 3) == "ab…"


def test_keys_are_found_behind_the_kind_of_the_change() -> None:
    live = LiveColumns(key_columns=("_op2", "n"), is_changelog=True)
    batch = changes(live, _op=["+I", "+I"], n=[2, 1], _op2=["x", "x"])
    rows = KeyedRows(batch.schema, live.key_columns)
    rows.apply(batch)
    assert lines_of(rows, batch.schema)[2:] == ["1  x", "2  x"]


# ---- on a terminal


class Steps:
    """Answers a statement with batches, each once it is let through."""

    def __init__(self, platform: PlainPlatform, statement: str, *batches: pa.RecordBatch) -> None:
        self._platform = platform
        self._batches = batches
        self._let_through = platform.call(self._semaphore())
        platform.service.answers[statement] = self._respond

    async def _semaphore(self) -> asyncio.Semaphore:
        return asyncio.Semaphore(0)

    async def _respond(self):
        schema = self._batches[0].schema
        yield sql_pb2.ExecuteResponse(arrow_stream=arrow_stream(schema, []))
        for batch in self._batches:
            await self._let_through.acquire()
            yield sql_pb2.ExecuteResponse(arrow_stream=arrow_stream(schema, [batch]))
        await asyncio.Event().wait()

    def next(self) -> None:
        async def release() -> None:
            self._let_through.release()

        self._platform.call(release())


class Terminal:
    """A pseudo-terminal; `shown` has all that a program wrote to it."""

    def __init__(self, leader: int) -> None:
        self._leader = leader
        self.shown = b""

    def type(self, text: str) -> None:
        os.write(self._leader, text.encode())

    def until(self, wanted: bytes, behind: int = 0) -> int:
        """Waits until `wanted` is shown behind a place; returns the place behind it."""
        with contextlib.suppress(OSError):  # the program has ended
            while wanted not in self.shown[behind:]:
                assert select.select([self._leader], [], [], PATIENCE_S)[0], self.shown
                self.shown += os.read(self._leader, 4096)
        assert wanted in self.shown[behind:], self.shown
        return self.shown.index(wanted, behind) + len(wanted)


@contextmanager
def on_a_terminal(platform: PlainPlatform, *arguments: str, **environ: str) -> Iterator[tuple]:
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "sql", "--bootstrap", platform.address, *arguments],
        env=os.environ | {"TERM": "xterm", "PAGER": "", "PROMPT_TOOLKIT_NO_CPR": "1", **environ},
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
    )
    os.close(follower)
    try:
        yield process, Terminal(leader)
    finally:
        process.kill()
        process.wait()
        os.close(leader)


@pytest.mark.long
def test_the_shell_redraws_a_table_until_ctrl_c_and_then_asks_for_the_next_statement(tmp_path) -> None:
    with plain_platform() as platform:
        platform.service.answers["SHOW TABLES"] = pa.table({"name": ["flights"]})
        steps = Steps(platform, LIVE, FIRST, SECOND)
        with on_a_terminal(platform, XDG_STATE_HOME=str(tmp_path)) as (process, terminal):
            at = terminal.until(b"streamhouse>")
            assert platform.ended() == "done"
            terminal.type(f"{LIVE};\r")
            at = terminal.until(b"(0 rows, 0 changes; Ctrl-C ends the query)", at)
            steps.next()
            at = terminal.until(b"(2 rows, 2 changes; Ctrl-C ends the query)", at)
            steps.next()
            # Over the table before, which had as many lines: the cursor goes up.
            begun = at
            at = terminal.until(b"(2 rows, 6 changes; Ctrl-C ends the query)", at)
            assert b"\x1b[5F" in terminal.shown[begun:at] and b"UA       3" in terminal.shown[begun:at]
            process.send_signal(signal.SIGINT)
            assert platform.ended() == "cancelled"
            begun = at
            at = terminal.until(b"streamhouse>", at)
            last = terminal.shown[begun:at]
            assert b"UA       3" in last and b"(2 rows, 6 changes)" in last and b"interrupted" not in last
            terminal.type("\\q\r")
            assert process.wait(PATIENCE_S) == 0


def test_a_statement_of_the_command_line_is_redrawn_too() -> None:
    with plain_platform() as platform:
        steps = Steps(platform, LIVE, FIRST, SECOND)
        with on_a_terminal(platform, "-c", LIVE) as (process, terminal):
            steps.next()
            at = terminal.until(b"(2 rows, 2 changes; Ctrl-C ends the query)")
            process.send_signal(signal.SIGINT)
            terminal.until(b"(2 rows, 2 changes)\x1b[K", at)
            assert process.wait(PATIENCE_S) == 130


@pytest.mark.long
def test_a_terminal_without_a_cursor_gets_changes() -> None:
    with plain_platform() as platform:
        steps = Steps(platform, LIVE, FIRST, SECOND)
        with on_a_terminal(platform, "-c", LIVE, TERM="dumb") as (process, terminal):
            steps.next()
            steps.next()
            terminal.until(b"+I   NULL     7")
            assert b"\x1b[" not in terminal.shown
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE_S) == 130


@pytest.mark.long
def test_the_service_that_stops_leaves_the_last_table_and_the_error(tmp_path) -> None:
    with plain_platform() as platform:
        steps = Steps(platform, LIVE, FIRST, changes(_op=["+I"], carrier=["x"], n=[1]).cast(FIRST.schema))
        with on_a_terminal(platform, "-c", LIVE) as (process, terminal):
            steps.next()
            at = terminal.until(b"(2 rows, 2 changes; Ctrl-C ends the query)")
            platform.call(platform.service.server.stop(0))
            at = terminal.until(b"(2 rows, 2 changes)\x1b[K", at)
            terminal.until(b"error: ", at)
            assert process.wait(PATIENCE_S) == 1


# ---- in pipes


@contextmanager
def in_a_pipe(platform: PlainPlatform, *arguments: str) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "sql", "--bootstrap", platform.address, "-c", LIVE, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("shape", "shown"),
    [
        ("json", [b'{"_op":"+I","carrier":"UA","n":2}\n', b'{"_op":"+I","carrier":"AA","n":1}\n']),
        pytest.param("csv", [b"_op,carrier,n\n", b"+I,UA,2\n", b"+I,AA,1\n"], marks=pytest.mark.long),
        pytest.param(
            "table",
            [b"_op  carrier  n\n", "───────────────\n".encode(), b"+I   UA       2\n", b"+I   AA       1\n"],
            marks=pytest.mark.long,
        ),
    ],
)
def test_changes_are_written_as_they_come(shape: str, shown: list[bytes]) -> None:
    with plain_platform() as platform:
        steps = Steps(platform, LIVE, FIRST, SECOND)
        with in_a_pipe(platform, "--format", shape) as process:
            steps.next()
            assert [process.stdout.readline() for _ in shown] == shown
            steps.next()
            assert b"-U" in process.stdout.readline()
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE_S) == 130
        assert platform.ended() == "cancelled"


@pytest.mark.long
@pytest.mark.parametrize("arguments", [["--output", "result.json", "--format", "json"], ["--format", "parquet"]])
def test_a_whole_result_of_a_query_without_end_is_refused(arguments: list[str], tmp_path) -> None:
    with plain_platform() as platform:
        Steps(platform, LIVE, FIRST)
        with in_a_pipe(platform, *arguments) as process:
            assert process.wait(PATIENCE_S) == 1
            assert re.search(rb"holds a whole result, and a live query has no end", process.stderr.read())
        assert platform.ended() == "cancelled"
