"""Many simulations: `python -m tests.simulation.run --seeds N --first S`, those of a list: `--file
tests/simulation/seeds.txt`, or one short run per step at which a process can die: `--crash-everywhere`.

Prints every failing one with its anomalies and where its log is; exit code 1 if there was one. Beside NAME.log lies
NAME.jsonl, the history, which `python -m tests.faults.checker` judges line by line.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import count
from pathlib import Path

from shruntime.signals import restore_sigint

from tests.simulation.runs import Keeping, Run, Shown, Workers

HASH_SEED = "0"
CRASHING = ("coordinator-0", "ingest-0", "ingest-1", "segmenter-0", "query-0", "producer-0", "member-0")
"""The processes of a run of one crash."""
PROGRESS_S = 15
PROGRESS_RUNS = 500
"""A line on stderr so often: where somebody looks by time, in a file by runs."""


class Runner:
    """Tells of runs."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._started = self._told = time.perf_counter()
        self.ran = 0
        self.failed = 0
        self._acknowledged = 0

    def has_enough(self) -> bool:
        """Or it was to stop at the first finding, and has one."""
        if self._options.until_found and self.failed:
            return True
        if not self._options.seconds or self.ran < self._options.at_least:
            return False
        return bool(time.perf_counter() - self._started > self._options.seconds)

    def tell(self, shown: Shown) -> None:
        self.ran += 1
        self._acknowledged += shown.acknowledged
        if self._options.verbose:
            print(
                f"{shown.name}: {shown.virtual_s:.0f} s virtual, {shown.steps} steps, {shown.faults} faults, "
                f"{shown.acknowledged} records acknowledged, {len(shown.anomalies)} anomalies",
                flush=True,
            )
        if shown.anomalies:
            self.failed += 1
            print(f"{shown.name} FAILS, log {self._options.logs / shown.name}.log", flush=True)
            for anomaly in shown.anomalies[:5]:
                print(f"    {anomaly.kind}: {anomaly.text[:300]}", flush=True)
        self._progress()

    def _progress(self) -> None:
        now = time.perf_counter()
        due = now - self._told >= PROGRESS_S if sys.stderr.isatty() else self.ran % PROGRESS_RUNS == 0
        if due:
            self._told = now
            print(self._summary(), file=sys.stderr, flush=True)

    def _summary(self) -> str:
        seconds = time.perf_counter() - self._started
        return (
            f"{self.ran} runs, {self.failed} failed, {self._acknowledged} records acknowledged, "
            f"{seconds:.1f} s, {self.ran / seconds:.1f} per second"
        )

    def end(self) -> int:
        print(self._summary())
        return 1 if self.failed else 0


def main(arguments: list[str]) -> int:
    options = _options(arguments)
    runner = Runner(options)
    with closing(Workers(options.jobs, Keeping(options.logs, options.keep, options.plant))) as workers:
        (crash_everywhere if options.crash_everywhere else run_seeds)(runner, workers, options)
    return runner.end()


def run_seeds(runner: Runner, workers: Workers, options: argparse.Namespace) -> None:
    seeds = seeds_in(options.file) if options.file else range(options.first, options.first + options.seeds)
    profile: str = options.profile or ""
    prefix = f"{profile}-" if profile else ""
    with closing(workers.show(Run(name=f"{prefix}seed-{seed}", seed=seed, profile=profile) for seed in seeds)) as shown:
        while not runner.has_enough() and (found := next(shown, None)) is not None:
            runner.tell(found)


def crash_everywhere(runner: Runner, workers: Workers, options: argparse.Namespace) -> None:
    """One process after the other dies at its step `first`, `first + every`, ... until there is no such step; the
    agents' machines also lose their power at each operation of their disks."""
    for power in (False, True):
        for node in CRASHING:
            if power and not node.startswith("ingest"):
                continue
            with closing(workers.show(_crashes(node, power, options))) as shown:
                while not runner.has_enough() and (found := next(shown)).faults:
                    runner.tell(found)


def _crashes(node: str, power: bool, options: argparse.Namespace) -> Iterator[Run]:
    from tests.simulation.crash import Crash

    for step in count(options.first, options.every):
        crash = Crash(node, step, power)
        yield Run(name=str(crash), seed=options.seed, crash=crash)


def seeds_in(path: Path) -> list[int]:
    """A seed at the beginning of each line, a # and what it found behind it."""
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return [int(line) for line in lines if line]


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many")
    parser.add_argument("--first", type=int, default=1, help="the first seed, or step")
    parser.add_argument("--jobs", type=_jobs, default=_cores(), help="processes, as many as cores by default")
    parser.add_argument("--seconds", type=float, default=0, help="begin no run after this; 0: no limit")
    parser.add_argument("--at-least", type=int, default=0, metavar="RUNS", help="so many, however long they take")
    parser.add_argument("--file", type=Path, help="the seeds of this file instead")
    parser.add_argument("--crash-everywhere", action="store_true", help="a run per step of every process")
    parser.add_argument("--every", type=int, default=1, help="with --crash-everywhere: only every so many-th step")
    parser.add_argument("--seed", type=int, default=1, help="with --crash-everywhere: of the run that is repeated")
    parser.add_argument(
        "--profile", type=_profile, metavar="NAME", help="of profiles.py, for every seed; drawn by default"
    )
    parser.add_argument("--plant", metavar="DEFECT", default="", help="with a defect on purpose, see planted.py")
    parser.add_argument("--until-found", action="store_true", help="end with the first one that fails")
    logs = Path(tempfile.gettempdir()) / "streamhouse-simulation"
    parser.add_argument("--logs", type=Path, default=logs, help=f"directory of the logs, {logs} by default")
    parser.add_argument("--keep", action="store_true", help="keep the logs of runs that pass, too")
    parser.add_argument("--verbose", action="store_true", help="a line per run")
    options = parser.parse_args(arguments)
    if options.profile and options.crash_everywhere:
        parser.error("--profile has no meaning with --crash-everywhere: the crash is all that goes wrong")
    return options


def _profile(name: str) -> str:
    from tests.simulation.profiles import PROFILES  # all of the simulation, which --help does without

    if name not in PROFILES:
        raise argparse.ArgumentTypeError(f"profile is {name!r}, must be one of {', '.join(PROFILES)}")
    return name


def _cores() -> int:
    """Those that this process may use, where the system says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _jobs(text: str) -> int:
    jobs = int(text)
    if jobs < 1:
        raise argparse.ArgumentTypeError(f"jobs is {jobs}, must be at least 1")
    return jobs


if __name__ == "__main__":
    restore_sigint()
    if os.environ.get("PYTHONHASHSEED") != HASH_SEED:
        # Sets of strings are iterated in the order of their hashes: fixed, so that a seed is the same everywhere.
        os.environ["PYTHONHASHSEED"] = HASH_SEED
        os.execv(sys.executable, [sys.executable, "-m", "tests.simulation.run", *sys.argv[1:]])
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # or its workers would live on
    sys.exit(main(sys.argv[1:]))
