"""Many simulations: `python -m tests.simulation.run --seeds N --first S [--seconds T] [--logs DIR] [--verbose]`, or
those of a list: `--file tests/simulation/seeds.txt`.

Prints every failing seed with its anomalies and where its log is; exit code 1 if there was one. Beside SEED.log lies
SEED.jsonl, the history, which `python -m tests.faults.checker` judges line by line.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

HASH_SEED = "0"


def main(arguments: list[str]) -> int:
    options = _options(arguments)
    from tests.faults.history import write_history
    from tests.simulation.world import simulate

    options.logs.mkdir(parents=True, exist_ok=True)
    seeds = seeds_in(options.file) if options.file else range(options.first, options.first + options.seeds)
    started, ran, failed, acknowledged = time.perf_counter(), 0, 0, 0
    for seed in seeds:
        if options.seconds and time.perf_counter() - started > options.seconds:
            break
        result = simulate(seed)
        ran += 1
        acknowledged += result.acknowledged
        if options.verbose:
            print(
                f"seed {seed}: {result.virtual_s:.0f} s virtual, {result.steps} steps, {result.faults} faults, "
                f"{result.acknowledged} records acknowledged, {len(result.anomalies)} anomalies",
                flush=True,
            )
        if result.anomalies or options.keep:
            path = options.logs / f"{seed}.log"
            path.write_text("\n".join(result.log) + "\n")
            write_history(path.with_suffix(".jsonl"), result.events)
        if result.anomalies:
            failed += 1
            print(f"seed {seed} FAILS, log {path}", flush=True)
            for anomaly in result.anomalies[:5]:
                print(f"    {anomaly.kind}: {anomaly.text[:300]}", flush=True)
    seconds = time.perf_counter() - started
    print(
        f"{ran} seeds from {options.file or options.first}, {failed} failed, {acknowledged} records acknowledged, "
        f"{seconds:.1f} s, {ran / seconds:.1f} seeds/s"
    )
    return 1 if failed else 0


def seeds_in(path: Path) -> list[int]:
    """A seed at the beginning of each line, a # and what it found behind it."""
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return [int(line) for line in lines if line]


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many")
    parser.add_argument("--first", type=int, default=1, help="the first one")
    parser.add_argument("--seconds", type=float, default=0, help="begin no seed after this; 0: no limit")
    parser.add_argument("--file", type=Path, help="the seeds of this file instead")
    logs = Path(tempfile.gettempdir()) / "streamhouse-simulation"
    parser.add_argument("--logs", type=Path, default=logs, help=f"directory of the logs, {logs} by default")
    parser.add_argument("--keep", action="store_true", help="keep the logs of seeds that pass, too")
    parser.add_argument("--verbose", action="store_true", help="a line per seed")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != HASH_SEED:
        # Sets of strings are iterated in the order of their hashes: fixed, so that a seed is the same everywhere.
        os.environ["PYTHONHASHSEED"] = HASH_SEED
        os.execv(sys.executable, [sys.executable, "-m", "tests.simulation.run", *sys.argv[1:]])
    sys.exit(main(sys.argv[1:]))
