"""Many simulations: `python -m tests.simulation.run --seeds N --first S`, those of a list: `--file
tests/simulation/seeds.txt`, or one short run per step at which a process can die: `--crash-everywhere`.

Prints every failing one with its anomalies and where its log is; exit code 1 if there was one. Beside NAME.log lies
NAME.jsonl, the history, which `python -m tests.faults.checker` judges line by line.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from opentelemetry import metrics

if TYPE_CHECKING:
    from tests.simulation.world import Result

HASH_SEED = "0"
CRASHING = ("coordinator-0", "ingest-0", "ingest-1", "segmenter-0", "query-0")
"""The processes of a run of one crash."""


class Runner:
    """Runs simulations and tells of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._started = time.perf_counter()
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

    def tell(self, name: str, result: Result) -> None:
        self.ran += 1
        self._acknowledged += result.acknowledged
        if self._options.verbose:
            print(
                f"{name}: {result.virtual_s:.0f} s virtual, {result.steps} steps, {result.faults} faults, "
                f"{result.acknowledged} records acknowledged, {len(result.anomalies)} anomalies",
                flush=True,
            )
        if result.anomalies or self._options.keep:
            self._keep(name, result)
        if result.anomalies:
            self.failed += 1
            print(f"{name} FAILS, log {self._options.logs / name}.log", flush=True)
            for anomaly in result.anomalies[:5]:
                print(f"    {anomaly.kind}: {anomaly.text[:300]}", flush=True)

    def _keep(self, name: str, result: Result) -> None:
        from tests.faults.history import write_history

        self._options.logs.mkdir(parents=True, exist_ok=True)
        (self._options.logs / f"{name}.log").write_text("\n".join(result.log) + "\n")
        write_history(self._options.logs / f"{name}.jsonl", result.events)

    def end(self) -> int:
        seconds = time.perf_counter() - self._started
        print(
            f"{self.ran} runs, {self.failed} failed, {self._acknowledged} records acknowledged, "
            f"{seconds:.1f} s, {self.ran / seconds:.1f} per second"
        )
        return 1 if self.failed else 0


def main(arguments: list[str]) -> int:
    from tests.simulation.planted import planted

    options = _options(arguments)
    # Otherwise every service that ever was is kept, for its metrics.
    metrics.set_meter_provider(metrics.NoOpMeterProvider())
    gc.freeze()  # the collections after each run are spared what was imported
    runner = Runner(options)
    with planted(options.plant) if options.plant else nullcontext():
        (crash_everywhere if options.crash_everywhere else run_seeds)(runner, options)
    return runner.end()


def run_seeds(runner: Runner, options: argparse.Namespace) -> None:
    from tests.simulation.world import simulate

    seeds = seeds_in(options.file) if options.file else range(options.first, options.first + options.seeds)
    for seed in seeds:
        if runner.has_enough():
            break
        runner.tell(f"seed-{seed}", simulate(seed))


def crash_everywhere(runner: Runner, options: argparse.Namespace) -> None:
    """One process after the other dies at its step `first`, `first + every`, ... until there is no such step; the
    agents' machines also lose their power at each operation of their disks."""
    from tests.simulation.crash import Crash
    from tests.simulation.world import simulate

    for power in (False, True):
        for node in CRASHING:
            if power and not node.startswith("ingest"):
                continue
            for step in count(options.first, options.every):
                if runner.has_enough():
                    return
                crash = Crash(node, step, power)
                result = simulate(options.seed, crash)
                if not result.faults:
                    break
                runner.tell(str(crash), result)


def seeds_in(path: Path) -> list[int]:
    """A seed at the beginning of each line, a # and what it found behind it."""
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return [int(line) for line in lines if line]


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many")
    parser.add_argument("--first", type=int, default=1, help="the first seed, or step")
    parser.add_argument("--seconds", type=float, default=0, help="begin no run after this; 0: no limit")
    parser.add_argument("--at-least", type=int, default=0, metavar="RUNS", help="so many, however long they take")
    parser.add_argument("--file", type=Path, help="the seeds of this file instead")
    parser.add_argument("--crash-everywhere", action="store_true", help="a run per step of every process")
    parser.add_argument("--every", type=int, default=1, help="with --crash-everywhere: only each so manieth step")
    parser.add_argument("--seed", type=int, default=1, help="with --crash-everywhere: of the run that is repeated")
    parser.add_argument("--plant", metavar="DEFECT", help="with a defect on purpose, see planted.py")
    parser.add_argument("--until-found", action="store_true", help="end with the first one that fails")
    logs = Path(tempfile.gettempdir()) / "streamhouse-simulation"
    parser.add_argument("--logs", type=Path, default=logs, help=f"directory of the logs, {logs} by default")
    parser.add_argument("--keep", action="store_true", help="keep the logs of runs that pass, too")
    parser.add_argument("--verbose", action="store_true", help="a line per run")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != HASH_SEED:
        # Sets of strings are iterated in the order of their hashes: fixed, so that a seed is the same everywhere.
        os.environ["PYTHONHASHSEED"] = HASH_SEED
        os.execv(sys.executable, [sys.executable, "-m", "tests.simulation.run", *sys.argv[1:]])
    sys.exit(main(sys.argv[1:]))
