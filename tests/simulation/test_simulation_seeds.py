"""Simulations in CI: new seeds for a while, every seed that ever found something, and the same seed twice."""

import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from streamhouse_ingest.adapters.wal import FileWal

from tests.simulation.run import HASH_SEED
from tests.simulation.world import simulate

ROOT = Path(__file__).parents[2]
SEEDS = Path(__file__).with_name("seeds.txt")
SECONDS = 40
SEEDS_MAX = 200
"""Per process; a machine with nothing else to do gets through them."""
PROCESSES = 2
PLANTED_SEEDS = range(40)


def run(*arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "tests.simulation.run", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": HASH_SEED},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def passed(process: "subprocess.Popen[str]") -> int:
    """How many seeds it was through."""
    output, _ = process.communicate()
    assert process.returncode == 0, output
    count = re.search(r"^(\d+) seeds", output, re.MULTILINE)
    assert count is not None, output
    return int(count[1])


def test_hundreds_of_seeds_show_no_anomaly(tmp_path: Path) -> None:
    """G1 to G5 and G8 hold whatever goes wrong."""
    options = ("--seeds", SEEDS_MAX, "--seconds", SECONDS, "--logs", tmp_path)
    processes = [run("--first", 1 + number * SEEDS_MAX, *options) for number in range(PROCESSES)]
    assert sum(passed(process) for process in processes) >= PROCESSES


def test_seeds_that_found_something_find_it_no_more(tmp_path: Path) -> None:
    assert passed(run("--file", SEEDS, "--logs", tmp_path)) >= 4


def test_the_same_seed_gives_the_same_log(tmp_path: Path) -> None:
    """Byte for byte, in another process, after another seed."""
    alone, second = tmp_path / "alone", tmp_path / "second"
    processes = [
        run("--first", 12, "--seeds", 1, "--keep", "--logs", alone),
        run("--first", 11, "--seeds", 2, "--keep", "--logs", second),
    ]
    for process in processes:
        passed(process)
    for name in ("12.log", "12.jsonl"):
        first = (alone / name).read_bytes()
        assert first and first == (second / name).read_bytes()
    assert (second / "11.log").read_bytes() != (alone / "12.log").read_bytes()


@pytest.mark.parametrize("fault", ["no fsync"])
def test_a_log_that_is_not_synced_is_found_out(fault: str) -> None:
    """The simulation can see what it looks for: without the fsync an acknowledged record is lost at a power cut."""
    with mock.patch.object(FileWal, "_sync", lambda self: None):
        kinds = {anomaly.kind for seed in PLANTED_SEEDS for anomaly in simulate(seed).anomalies}
    assert kinds & {"lost-write", "vanished", "two-values"}, kinds
