"""streamhouse sql translate: statements of a file or stdin, as another engine has them."""

import io
import subprocess

import pytest
from click.testing import CliRunner
from streamhouse_cli.app import cli

from cli.tests.test_cli_sql import MAIN, PATIENCE_S
from tests.bare import bare

BID = "CREATE TABLE bid (price DOUBLE) WITH (topic = 'bid', bad_rows = 'skip');\n"
FLINK = """\
CREATE TABLE `bid` (
  `price` DOUBLE
) WITH (
  'connector' = 'kafka',
  'topic' = 'bid',
  'properties.bootstrap.servers' = 'here:1',
  'scan.startup.mode' = 'earliest-offset',
  'format' = 'json',
  'json.ignore-parse-errors' = 'true',
  'json.timestamp-format.standard' = 'ISO-8601'
);

SELECT
  MAX(`price`) AS `high`
FROM `bid`;
"""


@pytest.fixture
def translate(capfd, monkeypatch):
    """Returns a function that runs the command in this process, and returns its exit code, stdout and stderr."""

    def run(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        with pytest.raises(SystemExit) as ended:
            cli(["sql", "translate", *arguments], prog_name="streamhouse")
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def test_a_file_and_stdin_are_translated(translate, tmp_path):
    text = f"{BID}SELECT MAX(price) AS high FROM bid"
    path = tmp_path / "q.sql"
    path.write_text(text)
    assert translate("--to", "flink", "--servers", "here:1", str(path)) == (0, FLINK, "")
    assert translate("--to", "flink", "--servers", "here:1", "-", stdin=text) == (0, FLINK, "")
    assert (
        "USING streamhouse OPTIONS (bootstrap '127.0.0.1:7070', topic 'bid')"
        in translate("--to", "spark", str(path))[1]
    )


def test_an_error_has_its_place_and_nothing_is_written(translate, tmp_path):
    path = tmp_path / "q.sql"
    path.write_text(f"{BID}SELECT price,\n  FOO(price) FROM bid")
    code, out, err = translate("--to", "risingwave", str(path))
    assert (code, out) == (1, "")
    assert err == (
        f"error: {path}:3:3: FOO(price) is not supported for risingwave (INVALID_STATEMENT)\n"
        "    FOO(price) FROM bid\n    ^\n"
    )
    code, out, err = translate("--to", "flink", "-", stdin="SHOW JOBS")
    assert (code, out) == (1, "") and "SHOW JOBS is not supported for flink" in err
    assert translate("--to", "flink", str(tmp_path / "nope.sql"))[0] == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["q.sql"], "Missing option '--to'"),
        (["--to", "oracle", "q.sql"], "'oracle' is not one of 'flink', 'risingwave', 'spark'"),
        (["--to", "flink"], "Missing argument 'FILE'"),
    ],
)
def test_usage(arguments, said):
    found = CliRunner().invoke(cli, ["sql", "translate", *arguments])
    assert found.exit_code == 2 and said in found.output


def test_help_says_what_is_translated():
    found = CliRunner().invoke(cli, ["sql", "translate", "--help"])
    assert found.exit_code == 0 and "CREATE MATERIALIZED VIEW" in found.output
    assert "translate" in CliRunner().invoke(cli, ["sql", "--help"]).output


def test_without_the_extra_the_error_names_it():
    done = subprocess.run(
        bare(MAIN, "sql", "translate", "--to", "flink", "-"),
        input="SELECT 1",
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "sqlglot, which is not installed: pip install '.[sql]'" in done.stderr
