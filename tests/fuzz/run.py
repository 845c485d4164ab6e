"""python -m tests.fuzz.run --minutes M --target NAME|all --seed S

Coverage-guided fuzzing of everything that reads bytes from disk, network or object store. Each target runs in a
process of its own for its share of the time; what it found lies in tests/fuzz/found/, where test_fuzz_regressions.py
replays it. The exit code is 1 when there was a finding.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from shruntime.signals import restore_sigint

from tests.fuzz.target import FOUND, ROOT
from tests.fuzz.targets import MODULES

_STATUS = re.compile(r"#(\d+)\s+\w+\s+cov: (\d+) ft: (\d+) corp: (\d+)/")
_NOISE = ("INFO:", "WARNING:", "###### ", '"')
# libFuzzer ends itself; a process that does not is stuck outside of the fuzzed code.
_GRACE_S = 180


@dataclass
class Report:
    """What one target's process printed: coverage counts edges of instrumented code, features also how often."""

    name: str
    executions: int = 0
    coverage: list[int] = field(default_factory=list)
    features: int = 0
    corpus: int = 0
    exit_code: int = 0
    found: list[str] = field(default_factory=list)

    def read(self, line: str) -> None:
        if match := _STATUS.search(line):
            self.executions, coverage, self.features, self.corpus = map(int, match.groups())
            self.coverage.append(coverage)
        elif line.startswith("FOUND "):
            self.found.append(line.removeprefix("FOUND ").strip())

    @property
    def line(self) -> str:
        first, last = (self.coverage[0], self.coverage[-1]) if self.coverage else (0, 0)
        return (
            f"{self.name:12} {self.executions:9,} runs, coverage {first:5} -> {last:5}, {self.features:6} features, "
            f"corpus {self.corpus:5}, exit {self.exit_code}, found {', '.join(self.found) or 'nothing'}"
        )


def run_target(name: str, seconds: int, seed: int, corpus_root: Path | None, *, verbose: bool) -> Report:
    """Fuzzes one target for `seconds`; prints its output when `verbose` or when something was found."""
    report = Report(name)
    before = set(FOUND.glob(f"{name}-*"))
    # PostgreSQL of a fuzzer that has just ended may still write there while it is removed.
    with tempfile.TemporaryDirectory(prefix=f"fuzz-{name}-", ignore_cleanup_errors=True) as scratch:
        corpus = Path(scratch, "corpus") if corpus_root is None else corpus_root.absolute() / name
        corpus.mkdir(parents=True, exist_ok=True)
        arguments = [f"--target={name}", f"--seconds={seconds}", f"--seed={seed}", f"--corpus={corpus}"]
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.child", *arguments],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": scratch},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            report.read(line)
            lines.append(line)
            if verbose:
                print(line, end="", flush=True)
        report.exit_code = process.wait(_GRACE_S)
    # What ended the process: a crash, or a loop in C. libFuzzer itself names these files.
    crashed = {path.name for path in set(FOUND.glob(f"{name}-*")) - before}
    report.found = sorted(crashed | set(report.found))
    if (report.found or report.exit_code) and not verbose:
        print("".join(line for line in lines if not (_STATUS.search(line) or line.startswith(_NOISE))))
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="for all targets together (default 10)")
    parser.add_argument("--target", default="all", choices=["all", *MODULES], help="default all")
    parser.add_argument("--seed", type=int, default=1, help="of libFuzzer and the mutators (default 1)")
    parser.add_argument("--corpus", type=Path, help="directory that keeps what was learnt, for the next run to go on")
    parser.add_argument("--verbose", action="store_true", help="show all that libFuzzer prints")
    arguments = parser.parse_args()
    names = list(MODULES) if arguments.target == "all" else [arguments.target]
    seconds = max(1, round(arguments.minutes * 60 / len(names)))
    FOUND.mkdir(exist_ok=True)
    print(f"seed {arguments.seed}, {seconds} s for each of {', '.join(names)}", flush=True)
    failed = False
    for name in names:
        report = run_target(name, seconds, arguments.seed, arguments.corpus, verbose=arguments.verbose)
        print(report.line, flush=True)
        failed |= bool(report.found or report.exit_code)
    return int(failed)


if __name__ == "__main__":
    restore_sigint()
    sys.exit(main())
