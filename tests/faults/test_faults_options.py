"""`make faults` as a user calls it: its options, its list, and what it says it did."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import nemeses
from tests.faults.nemesis import Faults
from tests.faults.run import again, parse, told_faults

ROOT = Path(__file__).parents[2]


def make(*variables: str) -> str:
    """Returns the command that `make faults` would run."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    done = subprocess.run(
        ["make", "--no-print-directory", "-n", "-o", ".venv/.ready-dev", "faults", *variables],
        cwd=ROOT, env=environ, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout.strip().splitlines()[-1]


def parsed(command: str) -> argparse.Namespace:
    """Parses the arguments that a shell would make of the command."""
    told = subprocess.run(
        ["sh", "-c", command.replace(".venv/bin/python -m tests.faults.run", "printf '%s\\n'")],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return parse(told.stdout.splitlines())


def test_make_hands_over_what_it_is_given() -> None:
    options = parsed(make("MINUTES=0.5", "SEED=0", "NEMESIS=kill, s3-*"))
    assert (options.minutes, options.seed, options.list) == (0.5, 0, False)
    assert options.nemesis == nemeses.chosen("kill,s3-*")
    options = parsed(make())
    assert options.minutes == 5 and options.seed >= 0 and options.nemesis == sorted(nemeses.NEMESES)
    assert parsed(make("LIST=1")).list


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--minutes", "0"], "--minutes: '0' is no number above 0 and up to 10080"),
        (["--minutes", "nan"], "--minutes: 'nan'"),
        (["--minutes", "ten"], "--minutes: 'ten'"),
        (["--minutes", "1e9"], "--minutes: '1e9'"),
        (["--seed", "-1"], "--seed: '-1' is no whole number from 0 on"),
        (["--seed", "x"], "--seed: 'x'"),
        (["--nemesis", "kil"], "--nemesis: unknown nemesis kil; near: kill"),
        (["--nemesis", ","], "--nemesis: unknown nemesis ','; `make faults LIST=1` lists all"),
    ],
)
def test_an_option_that_cannot_be_is_refused_before_anything_starts(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


def test_the_history_of_another_run_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "history.jsonl").touch()
    with pytest.raises(SystemExit):
        parse(["--dir", str(tmp_path)])
    assert "holds the history of another run" in capsys.readouterr().err


def test_the_list_has_each_nemesis_with_what_it_does() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.run", "--list"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    lines = {line.split()[0]: line.split(maxsplit=3)[1:] for line in done.stdout.splitlines()}
    assert lines.keys() == nemeses.NEMESES.keys()
    for name, (held, unit, does) in lines.items():
        assert f"{held} {unit}" == nemeses.held(name)
        assert len(does) > 10 and does.endswith((".", ";")), name
    assert len({does for _, _, does in lines.values()}) == len(lines), "two that say the same"


def test_a_failure_tells_how_to_meet_it_again() -> None:
    options = parse(["--minutes", "0.5", "--seed", "7", "--nemesis", "s3-late,kill"])
    assert again(options) == "make faults MINUTES=0.5 SEED=7 NEMESIS=kill,s3-late"
    command = again(parse(["--seed", "7"]))
    assert command == "make faults MINUTES=5 SEED=7 NEMESIS=all"
    assert parsed(make(*command.split()[2:])).seed == 7


def test_what_had_no_turn_is_told() -> None:
    faults = Faults(done=["kill", "pause", "kill"], impossible={"fsync": "no C compiler", "pause": "for a moment"})
    assert list(told_faults(["fsync", "kill", "pause", "power", "redis"], faults)) == [
        "faults 3: kill 2, pause 1",
        "not possible here: fsync: no C compiler",
        "no time for 2: power, redis",
    ]
    assert len(list(told_faults(["kill", "pause"], faults))) == 2
