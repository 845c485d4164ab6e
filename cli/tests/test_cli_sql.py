"""streamhouse sql as a process, against a service that answers with given Arrow streams."""

import contextlib
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner
from pyarrow import parquet
from shproto import errors
from streamhouse_cli.app import cli

from client.tests.sql_service import PlainPlatform, batch, endless, plain_platform
from tests.bare import bare

PATIENCE_S = 60
MAIN = "import sys; sys.argv[0] = 'streamhouse'; from streamhouse_cli import main; main(prog_name='streamhouse')"
FIRST, SECOND = batch(n=[1, 2], name=["a", None]), batch(n=[3], name=["c"])
ROWS = pa.Table.from_batches([FIRST, SECOND])


@pytest.fixture
def platform():
    with plain_platform() as found:
        found.service.answers["SELECT 1"] = [FIRST, SECOND]
        found.service.answers["SELECT 2"] = [SECOND]
        yield found


def environ(platform: PlainPlatform) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("STREAMHOUSE_")} | {
        "STREAMHOUSE_BOOTSTRAP": platform.address
    }


@pytest.fixture
def sql(platform, capfdbinary, monkeypatch):
    """Returns a function that runs the command in this process, and returns its exit code, stdout and stderr."""

    def run(*arguments: str, stdin: str | None = None) -> tuple[int, bytes, str]:
        given = io.TextIOWrapper(io.BytesIO((stdin or "").encode()))
        monkeypatch.setattr("sys.stdin", given)
        with pytest.raises(SystemExit) as ended:
            cli(["sql", "--bootstrap", platform.address, *arguments], prog_name="streamhouse")
        out, err = capfdbinary.readouterr()
        return int(ended.value.code or 0), out, err.decode()

    return run


# ---- statements


def test_a_statement_prints_its_table(sql):
    assert sql("-c", "SELECT 1") == (
        0,
        "n  name\n───────\n1  a\n2  NULL\n3  c\n(3 rows)\n".encode(),
        "",
    )


def test_statements_run_in_order(platform, sql):
    code, out, err = sql("-c", "SELECT 2; SELECT 1;", "-c", "SELECT 2", "--format", "json")
    assert (code, err) == (0, "")
    assert [json.loads(line)["n"] for line in out.splitlines()] == [3, 1, 2, 3, 3]
    assert platform.service.statements == ["SELECT 2", "SELECT 1", "SELECT 2"]


@pytest.mark.parametrize("source", ["file", "-", "stdin"])
def test_statements_come_from_a_file_or_stdin(platform, sql, source, tmp_path):
    platform.service.answers["SELECT ';'"] = [SECOND]
    text = "-- the first;\nSELECT ';';\n\nSELECT 1"
    (tmp_path / "q.sql").write_text("\ufeff" + text)
    arguments = {"file": ["-f", str(tmp_path / "q.sql")], "-": ["-f", "-"], "stdin": []}[source]
    code, out, err = sql(*arguments, "--format", "csv", stdin=text)
    assert (code, out, err) == (0, b"n,name\n3,c\nn,name\n1,a\n2,\n3,c\n", "")


def test_nothing_to_run_is_done_at_once(sql):
    assert sql(stdin=" -- nothing\n;") == (0, b"", "")


def test_the_time_limit_goes_to_the_service(platform, sql):
    assert sql("-c", "SELECT 1", "--timeout-ms", "1500")[0] == 0
    assert platform.service.asked[0].timeout_ms == 1500


# ---- errors


def test_an_error_names_its_place_in_the_file_and_shows_it(platform, sql, tmp_path):
    platform.service.answers["SELECT carier\nFROM flights"] = errors.InvalidStatement(
        "line 1, column 8: there is no column carier; is it carrier?", line=1, column=8
    )
    file = tmp_path / "q.sql"
    file.write_text("SELECT 2;\n  SELECT carier\nFROM flights;\nSELECT 1")
    code, out, err = sql("-f", str(file), "--format", "csv")
    assert code == 1 and out == b"n,name\n3,c\n"
    assert err == (
        f"error: {file}:2:10: there is no column carier; is it carrier? (INVALID_STATEMENT)\n"
        "    SELECT carier\n"
        "           ^\n"
    )
    assert len(platform.service.asked) == 2, "nothing runs behind an error"


def test_an_error_of_a_statement_from_the_command_line_names_line_and_column(platform, sql):
    platform.service.answers["SELECT x"] = errors.InvalidStatement("there is no column x", line=1, column=8)
    assert sql("-c", "SELECT x") == (
        1,
        b"",
        "error: line 1, column 8: there is no column x (INVALID_STATEMENT)\n  SELECT x\n         ^\n",
    )


def test_an_error_without_a_place_names_the_statement_of_a_file(platform, sql):
    platform.service.answers["SELECT 3"] = errors.StatementFailed("'a' is no number")
    assert sql("--format", "json", stdin="SELECT 2;\nSELECT 3")[2] == (
        "error: stdin:2:1: 'a' is no number (STATEMENT_FAILED)\n"
    )
    assert sql("-c", "SELECT 3")[2] == "error: 'a' is no number (STATEMENT_FAILED)\n"


def test_a_quote_without_end_is_found_before_anything_runs(platform, sql):
    code, out, err = sql(stdin="SELECT 1;\nSELECT 'a")
    assert (code, out) == (1, b"") and not platform.service.asked
    assert err == "error: stdin:2:8: the text that begins here has no end\n  SELECT 'a\n         ^\n"


def test_without_a_service_the_error_says_how_to_start_one(platform, sql):
    platform.coordinator.sql_addresses.clear()
    code, out, err = sql("-c", "SELECT 1")
    assert (code, out) == (1, b"") and err.count("\n") == 1
    assert err.startswith("error: no SQL service runs: `streamhouse serve` has one")


def test_where_nothing_answers_the_error_says_so(sql):
    code, out, err = sql("--bootstrap", "127.0.0.1:1", "--retry-timeout-ms", "300", "-c", "SELECT 1")
    assert (code, out) == (1, b"")
    assert err.startswith("error: nothing answers at 127.0.0.1:1: start it with `streamhouse serve`")


def test_a_file_beyond_the_limit_is_refused(sql, monkeypatch):
    monkeypatch.setattr("streamhouse_cli.sql_sources.SOURCE_BYTES_MAX", 8)
    assert sql(stdin="SELECT 1")[0] == 0
    assert sql(stdin="SELECT 1;") == (1, b"", "error: stdin: longer than the limit of 8 bytes\n")


def test_a_file_that_is_no_text_is_refused(sql, tmp_path):
    file = tmp_path / "q.sql"
    file.write_bytes(b"SELECT \xff")
    assert sql("-f", str(file))[2] == f"error: {file}: not UTF-8 at byte 7\n"
    assert sql("-f", str(tmp_path / "none"))[2] == f"error: {tmp_path}/none: No such file or directory\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-c", "SELECT 1", "-f", "x"], "-c and -f exclude each other"),
        (["-c", "SELECT 1", "--timeout-ms", "0"], "0 is not in the range x>=1"),
        (["-c", "SELECT 1", "--format", "xml"], "'xml' is not one of"),
    ],
)
def test_wrong_usage(arguments, said):
    found = CliRunner().invoke(cli, ["sql", *arguments])
    assert found.exit_code == 2 and said in found.output


def test_without_the_extra_the_error_names_it():
    done = subprocess.run(
        bare(MAIN, "sql", "-c", "SELECT 1"), capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr
        == "error: Sql needs pyarrow, which is not installed: pip install '.[sql]' in a checkout of StreamHouse\n"
    )


# ---- formats


def test_arrow_and_parquet_go_to_stdout(sql):
    code, out, _ = sql("-c", "SELECT 1", "--format", "arrow")
    assert code == 0 and pa.ipc.open_stream(out).read_all() == ROWS
    code, out, _ = sql("-c", "SELECT 1", "--format", "parquet")
    assert code == 0 and parquet.read_table(io.BytesIO(out)) == ROWS


@pytest.mark.parametrize("shape", ["arrow", "parquet"])
def test_bytes_hold_one_result_and_go_to_no_terminal(platform, sql, shape):
    code, out, err = sql("-c", "SELECT 1; SELECT 2", "--format", shape)
    assert (code, out, err) == (1, b"", f"error: --format {shape} holds the result of one statement, here are 2\n")
    code, shown = on_terminal(platform, "-c", "SELECT 1", "--format", shape)
    assert code == 1 and f"error: --format {shape} writes bytes, not text: name a file with --output" in shown
    assert not platform.service.asked


def test_a_type_that_parquet_lacks_is_named(platform, sql):
    platform.service.answers["SELECT 3"] = pa.table({"i": [pa.MonthDayNano([1, 2, 3])]})
    code, out, err = sql("-c", "SELECT 3", "--format", "parquet")
    assert (code, out) == (1, b"") and err.startswith("error: --format parquet has no type for a column")
    assert err.count("\n") == 1


def test_output_replaces_the_file_once_all_is_there(sql, tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("before")
    file.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to(file)
    assert sql("-c", "SELECT 1; SELECT 3", "--format", "csv", "--output", str(link))[0] == 1
    assert file.read_text() == "before"
    assert sql("-c", "SELECT 1", "--format", "csv", "--output", str(link)) == (0, b"", "")
    assert file.read_text() == "n,name\n1,a\n2,\n3,c\n" and file.stat().st_mode & 0o777 == 0o640
    assert link.is_symlink() and sorted(path.name for path in tmp_path.iterdir()) == ["link", "rows.csv"]


def test_output_to_a_new_file_has_the_mode_of_new_files(sql, tmp_path):
    (tmp_path / "other").touch()
    assert sql("-c", "SELECT 1", "--output", str(tmp_path / "rows"))[0] == 0
    assert (tmp_path / "rows").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_output_to_a_device_writes_to_it(sql):
    assert sql("-c", "SELECT 1", "--output", "/dev/null") == (0, b"", "")
    assert Path("/dev/null").is_char_device()


def test_output_where_there_is_no_directory_is_an_error(platform, sql, tmp_path):
    code, _, err = sql("-c", "SELECT 1", "--output", str(tmp_path / "none" / "rows"))
    assert code == 1 and "No such file or directory" in err and err.count("\n") == 1
    assert not platform.service.asked


# ---- a terminal


def on_terminal(platform: PlainPlatform, *arguments: str) -> tuple[int, str]:
    """Returns the exit code, and what a terminal would show."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "sql", *arguments],
        env=environ(platform) | {"TERM": "xterm-256color"},
        stdin=subprocess.DEVNULL,
        stdout=follower,
        stderr=follower,
    )
    os.close(follower)
    shown = b""
    with contextlib.suppress(OSError), open(leader, "rb", buffering=0) as terminal:  # EIO: the other end is closed
        while part := terminal.read(4096):
            shown += part
    return process.wait(PATIENCE_S), shown.decode().replace("\r\n", "\n")


def test_a_terminal_gets_styles(platform):
    code, shown = on_terminal(platform, "-c", "SELECT 1")
    assert code == 0 and "\x1b[1mn\x1b[0m" in shown and "\x1b[2mNULL\x1b[0m" in shown


# ---- streams


class Running:
    """The command as a process that is still running; killed when the block ends."""

    def __init__(self, platform: PlainPlatform, *arguments: str) -> None:
        pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        command = [sys.executable, "-c", MAIN, "sql", *arguments]
        self.process = subprocess.Popen(command, env=environ(platform), stdin=subprocess.DEVNULL, **pipes)

    def __enter__(self) -> subprocess.Popen[bytes]:
        return self.process

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdout, self.process.stderr):
            pipe.close()


def test_rows_are_printed_as_they_come_and_ctrl_c_ends_the_statement_on_the_server(platform):
    platform.service.answers["SELECT 1"] = endless(FIRST.schema, [FIRST])
    with Running(platform, "-c", "SELECT 1", "--format", "json") as process:
        assert json.loads(process.stdout.readline()) == {"n": 1, "name": "a"}
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 130
        assert platform.ended() == "cancelled"
        assert process.stderr.read() == b""


def test_a_reader_that_closes_the_pipe_ends_the_statement_quietly(platform):
    wide = batch(text=["x" * 1000] * 1000)
    platform.service.answers["SELECT 1"] = endless(wide.schema, [wide])
    with Running(platform, "-c", "SELECT 1", "--format", "json") as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(PATIENCE_S) == 0
        assert platform.ended() == "cancelled"
        assert process.stderr.read() == b""
        process.stdout = io.BytesIO()


def test_help_names_the_options():
    shown = CliRunner().invoke(cli, ["sql", "--help"]).output
    assert all(re.search(rf"--{name}\b", shown) for name in ("command", "file", "format", "output", "timeout-ms"))
