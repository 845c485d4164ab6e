"""One target under libFuzzer, in a process of its own: `run.py` starts it, and reads what libFuzzer prints.

A finding is written to found/ at once and fuzzing goes on; the same finding again, or one that is known and open,
is passed over.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random

import atheris

from tests.fuzz.target import FOUND, OPEN, Target, cpu_limit, limit_memory, signature

# Per target and run, so that a broken decoder does not fill the disk.
FINDINGS_MAX = 20
# Above CPU_SECONDS_MAX by enough that it ends only what no signal handler can: a loop in C.
_UNIT_TIMEOUT_S = 60
# A message may quote its input, which may be long.
_LINE_LENGTH_MAX = 300
_BLIND_MUTATION = 0.4
_LEAVE_UNREPAIRED = 0.1

# What a target needs to have loaded; instrumented unless the target says otherwise.
_OURS = [
    "shformat",
    "shproto.events",
    "shcluster",
    "shread",
    "streamhouse_ingest",
    "streamhouse_query",
    "streamhouse_coordinator",
]


def main() -> None:
    arguments = _arguments()
    with atheris.instrument_imports(include=_OURS):
        from tests.fuzz.targets import load

        target = load(arguments.target)
    corpus = Path(arguments.corpus)
    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    target.prepare()
    limit_memory(target.memory_bytes_max)
    options = [
        sys.argv[0],
        f"-max_total_time={arguments.seconds}",
        f"-seed={arguments.seed}",
        f"-max_len={target.size_bytes_max}",
        f"-timeout={_UNIT_TIMEOUT_S}",
        f"-report_slow_units={_UNIT_TIMEOUT_S}",
        "-rss_limit_mb=0",
        "-print_final_stats=1",
        f"-artifact_prefix={FOUND / target.name}-",
        str(corpus),
    ]
    atheris.Setup(options, _guarded(target), custom_mutator=_mutator(target))
    atheris.Fuzz()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--seconds", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--corpus", required=True)
    return parser.parse_args()


def _guarded(target: Target) -> Callable[[bytes], None]:
    # One cause shows in several targets: a finding's name without the target is its signature.
    known = {path.name.split("-", 1)[1] for path in OPEN.glob("*-*")}
    findings_max = len(known) + FINDINGS_MAX

    def check(data: bytes) -> None:
        try:
            with cpu_limit():
                target.check(data)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - whatever comes out is the finding
            name = signature(error)
            if name not in known and len(known) < findings_max:
                known.add(name)
                (FOUND / f"{target.name}-{name}").write_bytes(data)
                print(f"FOUND {target.name}-{name}", flush=True)
                print(_shortened(traceback.format_exc()), flush=True)

    return check


def _shortened(text: str) -> str:
    return "\n".join(
        line if len(line) <= _LINE_LENGTH_MAX else f"{line[:_LINE_LENGTH_MAX]}..." for line in text.splitlines()
    )


def _mutator(target: Target) -> Callable[[bytes, int, int], bytes]:
    def mutate(data: bytes, size_bytes_max: int, seed: int) -> bytes:
        rng = Random(seed)
        changed = data
        if rng.random() < _BLIND_MUTATION:
            changed = atheris.Mutate(data, size_bytes_max)
        else:
            for _ in range(rng.choice((1, 1, 1, 2, 4))):
                changed = target.mutate(changed, rng)
        if len(changed) <= size_bytes_max and rng.random() >= _LEAVE_UNREPAIRED:
            changed = target.repair(changed)
        return bytes(changed[:size_bytes_max])

    return mutate


if __name__ == "__main__":
    main()
