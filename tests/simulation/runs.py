"""One run of many, and what is kept of it; also in processes of its own, several at a time."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from opentelemetry import metrics

from tests.faults.history import write_history

if TYPE_CHECKING:
    from tests.faults.checks import Anomaly
    from tests.simulation.crash import Crash
    from tests.simulation.world import Result

AHEAD_PER_JOB = 2
"""Runs that are handed to a process before it asks: one that it works on, one that waits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A simulation to run. `crash`: all that goes wrong, see crash.py. `profile`: see profiles.py; empty: drawn."""

    name: str
    seed: int
    crash: Crash | None = None
    profile: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What a run showed."""

    name: str
    virtual_s: float
    steps: int
    faults: int
    acknowledged: int
    anomalies: list[Anomaly]


@dataclass(frozen=True, slots=True)
class Keeping:
    """Where logs go (NAME.log, NAME.jsonl), and whether also those of runs that pass. plant: see planted.py."""

    logs: Path
    keep_all: bool = False
    plant: str = ""


class Worker:
    """Simulates, in this process."""

    def __init__(self, keeping: Keeping) -> None:
        from tests.simulation import world
        from tests.simulation.planted import planted

        self._keeping = keeping
        self._simulate = world.simulate
        self._planted = ExitStack()
        if keeping.plant:
            self._planted.enter_context(planted(keeping.plant))
        # Otherwise every service that ever was is kept, for its metrics.
        metrics.set_meter_provider(metrics.NoOpMeterProvider())
        gc.freeze()  # the collections after each run are spared what was imported

    def close(self) -> None:
        self._planted.close()

    def run(self, run: Run) -> Shown:
        result = self._simulate(run.seed, run.crash, run.profile)
        if result.anomalies or self._keeping.keep_all:
            self._keep(run.name, result)
        return Shown(
            name=run.name,
            virtual_s=result.virtual_s,
            steps=result.steps,
            faults=result.faults,
            acknowledged=result.acknowledged,
            anomalies=result.anomalies,
        )

    def _keep(self, name: str, result: Result) -> None:
        logs = self._keeping.logs
        logs.mkdir(parents=True, exist_ok=True)
        (logs / f"{name}.log").write_text("\n".join(result.log) + "\n")
        write_history(logs / f"{name}.jsonl", result.events)


# ---- in processes of their own

_worker: Worker | None = None


def _begin(keeping: Keeping) -> None:
    global _worker
    _worker = Worker(keeping)


def _run(run: Run) -> Shown:
    assert _worker is not None
    return _worker.run(run)


class Workers:
    """`jobs` processes, or this one if it is one. What they show comes in the order of the runs, so that it does not
    depend on how many they are."""

    def __init__(self, jobs: int, keeping: Keeping) -> None:
        self._jobs = jobs
        self._worker = Worker(keeping) if jobs == 1 else None
        self._pool = (
            ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_begin, initargs=(keeping,))
            if jobs > 1
            else None
        )

    def show(self, runs: Iterable[Run]) -> Generator[Shown, None, None]:
        """Begins a few runs ahead; those that the caller does not come to are done in vain."""
        if self._worker is not None:
            yield from map(self._worker.run, runs)
        else:
            yield from self._in_parallel(runs)

    def _in_parallel(self, runs: Iterable[Run]) -> Generator[Shown, None, None]:
        assert self._pool is not None
        ahead: deque[Future[Shown]] = deque()
        try:
            for run in runs:
                ahead.append(self._pool.submit(_run, run))
                if len(ahead) >= self._jobs * AHEAD_PER_JOB:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
