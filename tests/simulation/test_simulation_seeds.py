"""Simulations in CI: new seeds for a while, every seed that ever found something, crashes at many steps, the same seed
twice; and defects on purpose, which must be found. How many seeds fit into the time says the machine, what holds says
every one of them."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.simulation.planted import PLANTED, PLANTED_PROFILES
from tests.simulation.run import HASH_SEED

ROOT = Path(__file__).parents[2]
SEEDS = Path(__file__).with_name("seeds.txt")
SECONDS = 45
SEEDS_MAX = 300
"""A machine with nothing else to do gets through most of them."""
RUNS_MIN = 16
"""However slow the machine is."""
JOBS = 2
CRASH_SEED = 1
CRASHES_EVERY = 100
"""Of some five thousand steps and operations at which a process or a machine can die: `make simulate CRASH=everywhere`
tries all of them."""
SAME_SEEDS = (7, 32, 33, 34, 35, 36)
"""Of each profile at least one; some with a group, some with hand-written readers and one with an SDK's."""
PLANTED_SEEDS_MAX = 100
"""A dozen is enough for each. A defect that needs more than a few dozen needs a profile (PLANTED_PROFILES)."""

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]


def run(*arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "tests.simulation.run", "--jobs", str(JOBS), *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": HASH_SEED},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def passed(process: "subprocess.Popen[str]") -> int:
    """How many runs it was through."""
    output, _ = process.communicate()
    assert process.returncode == 0, output
    count = re.search(r"^(\d+) runs", output, re.MULTILINE)
    assert count is not None, output
    return int(count[1])


def test_hundreds_of_seeds_show_no_anomaly(tmp_path: Path) -> None:
    """G1 to G5 and G8 hold whatever goes wrong."""
    assert (
        passed(run("--seeds", SEEDS_MAX, "--seconds", SECONDS, "--at-least", RUNS_MIN, "--logs", tmp_path)) >= RUNS_MIN
    )


def test_a_crash_between_any_two_steps_loses_nothing(tmp_path: Path) -> None:
    """A sample of them, by each of the processes in turn."""
    sample = ("--crash-everywhere", "--seed", CRASH_SEED, "--every", CRASHES_EVERY)
    assert passed(run(*sample, "--logs", tmp_path)) >= RUNS_MIN


def test_seeds_that_found_something_find_it_no_more(tmp_path: Path) -> None:
    assert passed(run("--file", SEEDS, "--logs", tmp_path)) >= 4


def test_the_same_seed_gives_the_same_log(tmp_path: Path) -> None:
    """Byte for byte, in another process, after other seeds; and runs are told of in their order, however many processes
    share them out."""
    seeds = tmp_path / "seeds.txt"
    seeds.write_text("".join(f"{seed}\n" for seed in SAME_SEEDS))
    options = ("--file", seeds, "--verbose", "--keep")
    processes = [run(*options, "--jobs", jobs, "--logs", tmp_path / str(jobs)) for jobs in (1, 2)]
    one, two = (process.communicate()[0].splitlines()[:-1] for process in processes)
    assert one == two and len(one) == len(SAME_SEEDS) and not any(process.returncode for process in processes), (
        one,
        two,
    )
    names = [f"seed-{seed}.{kind}" for seed in SAME_SEEDS for kind in ("log", "jsonl")]
    logs = [(tmp_path / "1" / name).read_bytes() for name in names]
    assert logs == [(tmp_path / "2" / name).read_bytes() for name in names]
    assert len(set(logs)) == len(logs)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, "Future[tuple[int, str]]"]]:
    """For each defect, the exit status and the output of runs until it is found: JOBS at a time."""
    logs = tmp_path_factory.mktemp("planted")
    with ThreadPoolExecutor(JOBS) as executor:
        yield {defect: executor.submit(look_for, defect, logs / defect) for defect in sorted(PLANTED)}


def look_for(defect: str, logs: Path) -> tuple[int, str]:
    profile = ("--profile", PLANTED_PROFILES[defect]) if defect in PLANTED_PROFILES else ()
    # With more jobs some are run in vain.
    process = run(
        "--plant", defect, *profile, "--seeds", PLANTED_SEEDS_MAX, "--until-found", "--jobs", 1, "--logs", logs
    )
    output, _ = process.communicate()
    return process.returncode, output


@pytest.mark.parametrize("defect", sorted(PLANTED))
def test_a_defect_on_purpose_is_found(defect: str, planted: Mapping[str, "Future[tuple[int, str]]"]) -> None:
    status, output = planted[defect].result()
    assert status == 1 and re.search(r"^\S*seed-\d+ FAILS", output, re.MULTILINE), output
    assert "defect:" not in output and "simulation:" not in output, f"it crashed instead of being wrong\n{output}"
