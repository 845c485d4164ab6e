"""The shell of streamhouse sql: typed inputs by prompt_toolkit's pipe, results in a file in place of the terminal."""

import asyncio
import contextlib
import os
import pty
import select
import signal
import stat
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pyarrow as pa
import pytest
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from shproto import errors
from streamhouse import Sql
from streamhouse_cli import sql_names, sql_screen, sql_shell
from streamhouse_cli.sql_names import Names, completions, quoted_name
from streamhouse_cli.sql_screen import PagerLeft, Screen, pager_command
from streamhouse_cli.sql_shell import Shell, cost_text, history_path, new_session, open_history

from client.tests.sql_service import Coordinator, SqlService, batch, endless, plain_platform

PATIENCE_S = 60
ROWS = batch(n=[1, 2], name=["a", None])
TABLE = "n  name\n───────\n1  a\n2  NULL\n(2 rows)\n"
TABLES = pa.table({"name": ["flights", "my-topic"], "partitions": [4, 1]})
DESCRIBED = pa.table({"column_name": ["carrier", "distance"], "column_type": ["VARCHAR", "BIGINT"]})


@pytest.fixture
async def service():
    async with SqlService() as found:
        found.answers |= {"SELECT 1": [ROWS], "SHOW TABLES": TABLES, "DESCRIBE flights": DESCRIBED}
        yield found


@pytest.fixture
async def sql(service):
    async with Coordinator() as coordinator:
        coordinator.sql_addresses.append(service.server.address)
        async with Sql(coordinator.address, retry_timeout_ms=2_000) as client:
            yield client


class Typed:
    """A shell, the keys that it gets and the file that it writes to."""

    def __init__(self, shell, keys, path):
        self.shell, self._keys, self._path = shell, keys, path

    def type(self, text):
        self._keys.send_text(text)

    async def run(self, *lines):
        """Runs the shell until the end of these lines."""
        self.type("".join(f"{line}\r" for line in lines) + "\x04")
        await asyncio.wait_for(self.shell.run(), PATIENCE_S)
        return self.shown

    @property
    def shown(self):
        return self._path.read_text()


@pytest.fixture
def open_shell(sql, service, tmp_path):
    """Returns a context manager of a shell without timing."""

    @asynccontextmanager
    async def opened(**options):
        path = tmp_path / "shown"
        names = Names(sql)
        with create_pipe_input() as keys, path.open("wb") as file:
            session = new_session(names, InMemoryHistory(), input=keys, output=DummyOutput())
            shell = Shell(sql, names, session, Screen(descriptor=file.fileno(), **options), bootstrap="127.0.0.1:7070")
            shell._is_timed = False
            await names.load()  # the names are fresh: completion asks for none in between
            service.asked.clear()
            assert await service.ended.get() == "done"
            try:
                yield Typed(shell, keys, path)
            finally:
                await names.close()

    return opened


# ---- statements


async def test_a_statement_runs_at_its_semicolon(open_shell, service):
    async with open_shell() as typed:
        assert await typed.run("SELECT 1;") == TABLE
    assert service.statements == ["SELECT 1"]


async def test_enter_begins_another_line_until_the_semicolon(open_shell, service):
    service.answers["SELECT ';'\n, 2"] = [ROWS]
    async with open_shell() as typed:
        assert await typed.run("SELECT ';'", ", 2", ";") == TABLE
    assert service.statements == ["SELECT ';'\n, 2"]


async def test_several_statements_of_an_input_run_up_to_one_that_fails(open_shell, service, capsys):
    async with open_shell() as typed:
        assert await typed.run("SELECT 1; SELECT x; SELECT 1;", "SELECT 1;") == TABLE * 2
    assert service.statements == ["SELECT 1", "SELECT x", "SELECT 1"]
    assert capsys.readouterr().err == (
        "error: line 1, column 11: there is no answer to 'SELECT x' (INVALID_STATEMENT)\n"
        "  SELECT 1; SELECT x; SELECT 1;\n"
        "            ^\n"
    )


async def test_a_service_that_is_gone_ends_no_shell(open_shell, service, capsys):
    service.answers["SELECT 2"] = errors.StatementTimeout("too long", timeout_ms=1)
    async with open_shell() as typed:
        assert await typed.run("SELECT 2;", "SELECT 1;") == TABLE
    assert capsys.readouterr().err == "error: too long (STATEMENT_TIMEOUT)\n"


async def test_an_input_without_a_statement_does_nothing(open_shell, service):
    async with open_shell() as typed:
        assert await typed.run("", "  ", ";", "-- nothing;", ";") == ""
    assert service.statements == []


@pytest.mark.parametrize("leave", ["\\q", "exit", "quit;", "QUIT"])
async def test_the_user_leaves_with_a_word(open_shell, leave):
    async with open_shell() as typed:
        typed.type(f"{leave}\r" if not leave.endswith("QUIT") else "quit\r")
        await asyncio.wait_for(typed.shell.run(), PATIENCE_S)


async def test_ctrl_c_at_the_prompt_drops_the_input(open_shell, service):
    async with open_shell() as typed:
        assert await typed.run("SELECT 2\x03SELECT 1;") == TABLE
    assert service.statements == ["SELECT 1"]


async def test_ctrl_c_ends_the_statement_and_not_the_shell(open_shell, service):
    service.answers["SELECT 2"] = endless(ROWS.schema, [ROWS])
    async with open_shell() as typed:
        typed.type("SELECT 2; SELECT 1;\r")
        running = asyncio.create_task(typed.shell.run())
        async with asyncio.timeout(PATIENCE_S):
            while "NULL" not in typed.shown:
                await asyncio.sleep(0.01)
        before = signal.getsignal(signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert await asyncio.wait_for(service.ended.get(), PATIENCE_S) == "cancelled"
        typed.type("SELECT 1;\r\x04")
        await asyncio.wait_for(running, PATIENCE_S)
        assert signal.getsignal(signal.SIGINT) is not before
        assert typed.shown.endswith("interrupted\n" + TABLE)
    assert service.statements == ["SELECT 2", "SELECT 1"]


async def test_the_end_of_the_shell_ends_its_statement(open_shell, service):
    service.answers["SELECT 2"] = endless(ROWS.schema, [ROWS])
    async with open_shell() as typed:
        typed.type("SELECT 2;\r")
        running = asyncio.create_task(typed.shell.run())
        async with asyncio.timeout(PATIENCE_S):
            while "NULL" not in typed.shown:
                await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert await asyncio.wait_for(service.ended.get(), PATIENCE_S) == "cancelled"


async def test_time_and_cost_stand_behind_a_result(open_shell):
    async with open_shell() as typed:
        shown = await typed.run("\\timing", "SELECT 1;", "\\timing off", "SELECT 1;")
    timed = shown.split(TABLE)[1]
    assert timed.startswith("time: ") and timed.endswith("; 20 records scanned (2.0 KiB)\ntiming is off\n")


def test_cost_as_people_read_it():
    assert cost_text(0.0123, None) == "time: 12 ms"
    assert cost_text(61.234, None) == "time: 61.23 s"


# ---- commands


async def test_commands_show_tables_and_columns(open_shell, service):
    service.answers['DESCRIBE "my-topic"'] = DESCRIBED
    async with open_shell() as typed:
        shown = await typed.run("\\d", "\\dt", "\\d flights", "\\d my-topic", "\\d flights;")
    assert shown.count("my-topic") == 2 and shown.count("carrier") == 3
    assert service.statements == [
        "SHOW TABLES", "SHOW TABLES", "DESCRIBE flights", 'DESCRIBE "my-topic"', "DESCRIBE flights"
    ]  # fmt: skip


async def test_formats_are_switched(open_shell):
    async with open_shell() as typed:
        shown = await typed.run("\\x", "SELECT 1;", "\\x off", "\\format json", "SELECT 1;", "\\format")
    assert "expanded display is on\n─[ row 1 ]" in shown and "expanded display is off\n" in shown
    assert shown.endswith('format is json\n{"n":1,"name":"a"}\n{"n":2,"name":null}\nformat is json\n')


async def test_help_lists_every_command(open_shell):
    async with open_shell() as typed:
        shown = await typed.run("\\?")
    assert all(command in shown for command in sql_shell.HELP)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("\\foo", "there is no command \\foo"),
        ("\\x maybe", "\\x takes on or off, not 'maybe'"),
        ("\\format parquet", "'parquet' needs -c or -f"),
    ],
)
async def test_a_wrong_command_is_an_error_and_the_shell_goes_on(open_shell, capsys, line, said):
    async with open_shell() as typed:
        assert await typed.run(line, "SELECT 1;") == TABLE
    assert said in capsys.readouterr().err


# ---- completion


def found(text, names):
    return [word for word, _ in completions(text, names, sql_shell.COMMANDS)]


@pytest.fixture
async def names(sql, service):
    names = Names(sql)
    await names.load()
    names.refresh(["flights"])
    await names._task
    yield names
    await names.close()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("SEL", ["SELECT"]),
        ("sel", ["select"]),
        ("SELECT * FROM f", ["flights"]),
        ("SELECT * FROM ", ["flights", '"my-topic"']),
        ("SELECT * FROM m", ['"my-topic"']),
        ("SELECT * FROM flights WHERE car", ["carrier"]),
        ("SELECT * FROM flights WHERE flights.d", ["distance"]),
        ("SELECT * FROM flights f WHERE f.d", ["distance"]),
        ("SELECT * FROM flights; SELECT car", []),
        ("SELECT 'fro", []),
        ("-- fro", []),
        ("\\ti", ["\\timing"]),
        ("\\d f", ["flights"]),
        ("\\x f", []),
        ("", []),
    ],
)
async def test_completions(names, text, expected):
    assert found(text, names) == expected


async def test_completions_replace_the_word_before_the_cursor(names):
    assert list(completions("SELECT flights.", names, ())) == [("carrier", 0), ("distance", 0)]
    assert list(completions("SELECT missing.d", names, ())) == []
    assert list(completions("SELECT flights.di FROM flights WHERE flights.di", names, ())) == [("distance", 2)]


async def test_names_are_kept_and_asked_for_again_after_a_change(names, service):
    assert service.statements == ["SHOW TABLES", "DESCRIBE flights"]
    names.refresh(["flights"])
    await names._task
    assert len(service.asked) == 2
    service.answers["SHOW TABLES"] = pa.table({"name": ["new"]})
    names.forget()
    names.refresh(())
    await names._task
    assert names.tables == ("new",) and names.columns("flights") == ("carrier", "distance")


async def test_names_that_cannot_be_asked_for_are_missing(names, service):
    del service.answers["DESCRIBE flights"]
    names.forget()
    names.refresh(["flights"])
    await names._task
    assert names.columns("flights") == () and names.tables == ("flights", "my-topic")


async def test_a_service_that_refuses_its_names_is_there_and_one_that_is_away_is_not(sql, service):
    service.answers["SHOW TABLES"] = errors.StatementTimeout("busy", timeout_ms=5_000)
    names = Names(sql)
    await names.load()
    assert names.tables == ()
    service.answers["SHOW TABLES"] = errors.Unavailable("PostgreSQL is away")
    with pytest.raises(errors.Unavailable):
        await names.load()


async def test_a_table_with_the_name_of_its_topic_is_one_name(sql, service):
    service.answers["SHOW TABLES"] = pa.table({"name": ["flights", "flights"], "kind": ["table", "topic"]})
    names = Names(sql)
    await names.load()
    assert names.tables == ("flights",)


async def test_columns_are_kept_of_some_tables(names, service, monkeypatch):
    monkeypatch.setattr(sql_names, "DESCRIBED_MAX", 2)
    for name in ("a", "b", "c"):
        service.answers[f"DESCRIBE {name}"] = DESCRIBED
    names.refresh(["a", "b", "c"])
    await names._task
    assert [name for name in ("flights", "a", "b", "c") if names.columns(name)] == ["b", "c"]


def test_a_name_is_quoted_where_a_statement_needs_it():
    assert [quoted_name(name) for name in ("a_1", "my-topic", 'a"b', '"a"')] == ["a_1", '"my-topic"', '"a""b"', '"a"']


async def test_tab_completes_in_the_prompt(open_shell, service):
    async with open_shell() as typed:
        service.answers["SELECT 1 FROM flights"] = [ROWS]
        typed.type("SELECT 1 FROM fl")
        running = asyncio.create_task(typed.shell.run())
        buffer = typed.shell._session.default_buffer
        async with asyncio.timeout(PATIENCE_S):
            while buffer.complete_state is None or not buffer.complete_state.completions:
                await asyncio.sleep(0.01)
            typed.type("\t")
            while buffer.text != "SELECT 1 FROM flights":
                await asyncio.sleep(0.01)
        typed.type(";\r\x04")
        await asyncio.wait_for(running, PATIENCE_S)
        assert typed.shown == TABLE


# ---- long results


def pages(tmp_path, command="cat", lines=6, columns=40):
    return {"pager": f"{command} > {tmp_path}/paged", "size": (columns, lines)}


async def test_a_result_that_fits_is_printed(open_shell, tmp_path):
    async with open_shell(**pages(tmp_path, lines=7)) as typed:
        assert await typed.run("SELECT 1;") == TABLE
    assert not (tmp_path / "paged").exists()


@pytest.mark.parametrize("what", ["long", "wide"])
async def test_a_result_larger_than_the_screen_is_paged(open_shell, service, tmp_path, what):
    rows = batch(n=list(range(100))) if what == "long" else batch(n=["x" * 41])
    service.answers["SELECT 2"] = [rows, rows]
    async with open_shell(**pages(tmp_path)) as typed:
        assert await typed.run("SELECT 2;") == ""
    assert (tmp_path / "paged").read_text().endswith(f"({2 * rows.num_rows} rows)\n")


async def test_styles_have_no_width(open_shell, service, tmp_path):
    service.answers["SELECT 2"] = [batch(n=["x" * 38, None])]
    async with open_shell(styled=True, **pages(tmp_path, lines=9)) as typed:
        assert "\x1b[2mNULL" in await typed.run("SELECT 2;")


async def test_leaving_the_pager_ends_the_statement(open_shell, service, tmp_path):
    rows = batch(n=list(range(100_000)))
    service.answers["SELECT 2"] = endless(rows.schema, [rows, rows])
    async with open_shell(**pages(tmp_path, "head -1")) as typed:
        assert await typed.run("SELECT 2;", "SELECT 1;") == ""
    assert await asyncio.wait_for(service.ended.get(), PATIENCE_S) == "cancelled"
    assert service.statements == ["SELECT 2", "SELECT 1"]


async def test_rows_that_trickle_are_shown_after_a_moment(open_shell, service, tmp_path, monkeypatch):
    monkeypatch.setattr(sql_screen, "HOLD_S", 0.01)
    service.answers["SELECT 2"] = endless(ROWS.schema, [ROWS])
    async with open_shell(**pages(tmp_path, lines=50)) as typed:
        typed.type("SELECT 2;\r")
        running = asyncio.create_task(typed.shell.run())
        async with asyncio.timeout(PATIENCE_S):
            while "NULL" not in typed.shown:
                await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running


async def test_ctrl_c_belongs_to_a_pager_that_has_all_rows(open_shell, service, tmp_path):
    service.answers["SELECT 2"] = [batch(n=list(range(100)))]
    go = tmp_path / "go"
    pager = f"sh -c 'trap : INT; cat > {tmp_path}/paged; while [ ! -e {go} ]; do sleep 0.05; done'"
    async with open_shell(pager=pager, size=(40, 6)) as typed:
        typed.type("SELECT 2;\r\x04")
        running = asyncio.create_task(typed.shell.run())
        async with asyncio.timeout(PATIENCE_S):
            while typed.shell._shown is None or not typed.shell._shown.is_read:
                await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(0)
        go.touch()
        await asyncio.wait_for(running, PATIENCE_S)
        assert typed.shown == ""


async def test_the_end_of_the_shell_ends_its_pager(open_shell, service):
    service.answers["SELECT 2"] = [batch(n=list(range(100)))]
    async with open_shell(pager="exec sleep 3600", size=(40, 6)) as typed:
        typed.type("SELECT 2;\r")
        running = asyncio.create_task(typed.shell.run())
        async with asyncio.timeout(PATIENCE_S):
            while typed.shell._shown is None or not typed.shell._shown.is_read:
                await asyncio.sleep(0.01)
        process = typed.shell._shown._process
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert process.returncode == -signal.SIGTERM


async def test_a_pager_that_is_gone_is_told_apart_from_errors(tmp_path):
    with (tmp_path / "shown").open("wb") as file:
        shown = Screen(descriptor=file.fileno(), pager="exec true", size=(10, 4)).result()
        with pytest.raises(PagerLeft):
            async with shown:
                for _ in range(1000):
                    await shown.write(b"x\n" * 10_000)


def test_the_pager_is_the_environments(monkeypatch):
    monkeypatch.setenv("PAGER", " more -d ")
    assert pager_command() == "more -d"
    monkeypatch.setenv("PAGER", "")
    assert pager_command() == ""
    monkeypatch.delenv("PAGER")
    monkeypatch.setenv("PATH", "")
    assert pager_command() == ""


# ---- history


def test_the_history_is_its_owners_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    path = history_path()
    assert path == tmp_path / "state" / "streamhouse" / "sql_history"
    open_history(path).append_string("SELECT 1;")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.chmod(0o644)
    history = open_history(path)
    assert list(history.load_history_strings()) == ["SELECT 1;"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_history_is_in_the_users_state_directory(monkeypatch):
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(history_path()) == "/home/somebody/.local/state/streamhouse/sql_history"


def test_a_history_that_cannot_be_kept_is_that_of_the_session(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert isinstance(open_history(tmp_path / "file" / "history"), InMemoryHistory)
    assert capsys.readouterr().err.startswith("the history is not kept: ")


def test_a_link_to_a_device_is_left_as_it_is(tmp_path):
    before = Path("/dev/null").stat().st_mode
    (tmp_path / "history").symlink_to("/dev/null")
    open_history(tmp_path / "history")
    assert Path("/dev/null").stat().st_mode == before


def test_a_long_history_loses_its_oldest_half(tmp_path, monkeypatch):
    monkeypatch.setattr(sql_shell, "HISTORY_BYTES_MAX", 1000)
    path = tmp_path / "history"
    for number in range(50):
        open_history(path).append_string(f"SELECT {number};")
    assert path.stat().st_size < 1100
    kept = list(open_history(path).load_history_strings())
    assert kept == [f"SELECT {number};" for number in range(49, 49 - len(kept), -1)] and len(kept) > 5
    assert isinstance(open_history(path), FileHistory)


# ---- on a terminal


def test_the_command_opens_the_shell_on_a_terminal(tmp_path):
    """As a user has it: a pseudo-terminal, the prompt, a statement, and out."""
    main = "import sys; sys.argv[0] = 'streamhouse'; from streamhouse_cli import main; main(prog_name='streamhouse')"
    with plain_platform() as platform:
        platform.service.answers |= {"SELECT 1": [ROWS], "SHOW TABLES": TABLES}
        leader, follower = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-c", main, "sql", "--bootstrap", platform.address],
            env=os.environ
            | {"TERM": "xterm", "XDG_STATE_HOME": str(tmp_path), "PAGER": "", "PROMPT_TOOLKIT_NO_CPR": "1"},
            stdin=follower,
            stdout=follower,
            stderr=follower,
            start_new_session=True,
        )
        os.close(follower)
        try:
            terminal = Terminal(leader)
            assert b"\\? for help" in terminal.until(b"streamhouse>")
            os.write(leader, b"SELECT 1;\r")
            assert b"NULL" in terminal.until(b"scanned (2.0 KiB)")
            terminal.until(b"streamhouse>")
            os.write(leader, b"\\q\r")
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()
            process.wait()
            os.close(leader)
    assert "SELECT 1;" in (tmp_path / "streamhouse" / "sql_history").read_text()


class Terminal:
    """Reads a pseudo-terminal. A read may return more than is waited for: the rest is kept for the next wait."""

    def __init__(self, descriptor):
        self._descriptor = descriptor
        self._rest = b""

    def until(self, wanted):
        """Returns what the terminal shows up to `wanted`, and that."""
        shown = self._rest
        with contextlib.suppress(OSError):
            while wanted not in shown:
                assert select.select([self._descriptor], [], [], PATIENCE_S)[0], shown
                shown += os.read(self._descriptor, 4096)
        assert wanted in shown, shown
        end = shown.index(wanted) + len(wanted)
        self._rest = shown[end:]
        return shown[:end]


@pytest.mark.parametrize("arguments", [["--format", "arrow"], ["--output", "x"]])
def test_a_shell_writes_no_bytes_and_no_file(arguments):
    leader, follower = pty.openpty()
    main = "import sys; sys.argv[0] = 'streamhouse'; from streamhouse_cli import main; main(prog_name='streamhouse')"
    done = subprocess.run(
        [sys.executable, "-c", main, "sql", *arguments], stdin=follower, stdout=follower, stderr=subprocess.PIPE,
        timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    os.close(follower)
    os.close(leader)
    assert done.returncode == 2 and b"needs -c or -f" in done.stderr
