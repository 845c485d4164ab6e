"""A run: `python -m tests.faults.run --minutes 5 --seed 7 --nemesis kill,pause --dir /tmp/run`.

Starts a fleet, producers and consumers, torments it, heals it, waits until everything is registered, reads
everything back and lets the checker judge. Exit code 0: no anomaly; 1: anomalies, or it did not come to rest; the
directory with history and logs is kept then. 2: it cannot run here, or not with these options; 130: interrupted.
"""

import argparse
import asyncio
import contextlib
import random
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from shproto.errors import StreamHouseError
from shruntime.signals import restore_sigint
from streamhouse import Admin

from tests.faults import facts, history, nemeses, nemesis, progress
from tests.faults.checker import Report, check, explain
from tests.faults.consumers import GroupWatcher, Membership, PlainConsumer, Rereader
from tests.faults.fleet import Fleet
from tests.faults.history import Recorder
from tests.faults.producers import SdkProducer, SingleTryProducer, Target

WAL = Target("wal", 4, "wal")
DURABLE = Target("durable", 3, "durable")
TARGETS = (WAL, DURABLE)
PARTITIONS = [(target.topic, number) for target in TARGETS for number in range(target.partitions)]
GROUP = "group"
MEMBERS = 2
MEMBER_STAYS_S = (4.0, 15.0)
WARM_UP_S = 3.0
MINUTES_MAX = 7 * 24 * 60
"""A week: more is a slip of the keyboard."""

PRODUCERS_DEADLINE_S = 120.0
"""Twice the SDK's delivery timeout here: by then every operation has an outcome."""

SETTLE_DEADLINE_S = 120.0
"""Everything is back: sessions take a TTL, claims another, uploads a second."""

CATCH_UP_DEADLINE_S = 60.0
SWEEP_DEADLINE_S = 60.0


class Run:
    """One run in one event loop."""

    def __init__(self, work_dir: Path, seed: int, names: Sequence[str], seconds: float) -> None:
        self.recorder = Recorder(work_dir / "history.jsonl")
        self.fleet = Fleet(work_dir, self.recorder)
        self.rng = random.Random(seed)
        self.names = list(names)
        self.seconds = seconds
        self.faults = nemesis.Faults()
        self.ends_s: float | None = None
        self.trouble: list[str] = []
        self._producers: list[SdkProducer | SingleTryProducer] = []
        self._consumers: list[PlainConsumer] = []
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """What goes wrong with the run itself is in `trouble`; the history up to there can be judged all the same."""
        try:
            _raise_descriptor_limit()
            await self.fleet.start()
            await self._create_topics()
            members = self._start_workload()
            await asyncio.sleep(WARM_UP_S)
            seed = random.Random(self.rng.getrandbits(64))
            self.ends_s = time.monotonic() + self.seconds
            await nemesis.torment(self.fleet, seed, self.names, self.seconds, self.recorder, self.faults)
            self.recorder.note("run", "heals everything")
            await self.fleet.heal()
            await self._finish(members)
            await self.fleet.stop()
        except facts.NotSettled as reason:
            self.trouble.append(f"did not come to rest: {reason}")
        except (AssertionError, OSError, RuntimeError, StreamHouseError, TimeoutError, ExceptionGroup) as error:
            self.trouble.append("".join(traceback.format_exception(error)))
        finally:
            await self._end_tasks(self._tasks)
            await self.fleet.close()
            self.recorder.close()

    async def _create_topics(self) -> None:
        async with Admin(self.fleet.bootstrap()) as admin:
            for target in TARGETS:
                await admin.create_topic(target.topic, target.partitions, min_acks=target.acks)
                self.recorder.write(history.Topic(target.topic, target.partitions, target.acks))

    # ---- workload

    def _start_workload(self) -> Membership:
        for number, target in enumerate((WAL, WAL, DURABLE), 1):
            self._producers.append(SdkProducer(f"sdk-{number}", target, self.recorder, self._own_rng()))
        for number, target in enumerate((WAL, DURABLE), 1):
            self._producers.append(SingleTryProducer(f"once-{number}", target, self.recorder, self._own_rng()))
        self._consumers = [PlainConsumer(f"plain-{number}", PARTITIONS, self.recorder) for number in (1, 2)]
        rereader = Rereader("rereading", self._consumers[0], self.recorder, self._own_rng())
        bootstrap = self.fleet.bootstrap()
        for worker in (*self._producers, *self._consumers, rereader):
            self._tasks[worker.process] = asyncio.create_task(worker.run(bootstrap), name=worker.process)
        topics = [target.topic for target in TARGETS]
        members = Membership(GROUP, topics, bootstrap, self.recorder, self._own_rng())
        for _ in range(MEMBERS):
            members.join()
        watcher = GroupWatcher("watcher", GROUP, PARTITIONS, self.recorder)
        self._tasks["watcher"] = asyncio.create_task(watcher.run(bootstrap), name="watcher")
        self._tasks["members"] = asyncio.create_task(self._change_members(members), name="members")
        return members

    def _own_rng(self) -> random.Random:
        return random.Random(self.rng.getrandbits(64))

    async def _change_members(self, members: Membership) -> None:
        rng = self._own_rng()
        while True:
            await asyncio.sleep(rng.uniform(*MEMBER_STAYS_S))
            self.recorder.note("members", f"{members.join()} joins")
            await asyncio.sleep(rng.uniform(*MEMBER_STAYS_S))
            self.recorder.note("members", f"{await members.leave()} leaves")

    async def _end_tasks(self, tasks: dict[str, asyncio.Task[None]]) -> None:
        """A worker that failed is trouble: it was to run for ever."""
        for task in tasks.values():
            task.cancel()
        for name, outcome in zip(tasks, await asyncio.gather(*tasks.values(), return_exceptions=True), strict=True):
            if isinstance(outcome, Exception):
                self.trouble.append(f"{name} failed: {type(outcome).__name__}: {outcome}")
        tasks.clear()

    # ---- the end

    async def _finish(self, members: Membership) -> None:
        """Raises NotSettled."""
        await self._end_tasks({"members": self._tasks.pop("members")})
        await self._stop_producers()
        await facts.wait_until_registered(self.fleet, SETTLE_DEADLINE_S)
        self.recorder.note("run", "everything is registered")
        ends = await facts.read_back_everywhere(self.fleet, PARTITIONS, self.recorder, CATCH_UP_DEADLINE_S)
        await self._catch_up(ends)
        await self._end_tasks(self._tasks)
        await members.close()
        await self.fleet.sweep()
        referred = await facts.record_metadata(self.fleet, self.recorder)
        await facts.record_objects(self.fleet, self.recorder, referred, SWEEP_DEADLINE_S)
        self.recorder.write(history.End())

    async def _stop_producers(self) -> None:
        for producer in self._producers:
            producer.stopping = True
        tasks = {producer.process: self._tasks.pop(producer.process) for producer in self._producers}
        _, late = await asyncio.wait(tasks.values(), timeout=PRODUCERS_DEADLINE_S)
        if late:
            self.trouble.append(f"still producing: {', '.join(task.get_name() for task in late)}")
        await self._end_tasks(tasks)

    async def _catch_up(self, ends: Mapping[facts.Where, int]) -> None:
        """Consumers have some time to get to the end; records where they stand then."""
        last = {where: end for where, end in ends.items() if end}
        deadline = time.monotonic() + CATCH_UP_DEADLINE_S
        watcher = GroupWatcher("watcher-end", GROUP, PARTITIONS, self.recorder)
        async with Admin(self.fleet.bootstrap()) as admin:
            while True:
                committed = await watcher.look(admin) or {}
                standing = [committed, *(consumer.positions for consumer in self._consumers)]
                behind = any(at.get(where, 0) < end for at in standing for where, end in last.items())
                if not behind or time.monotonic() > deadline:
                    break
                await asyncio.sleep(1)
        for consumer in self._consumers:
            for where, offset in consumer.positions.items():
                self.recorder.write(history.Position(consumer.process, *where, offset))
        for where in PARTITIONS:
            self.recorder.write(history.Position("members", *where, committed.get(where, 0), group=GROUP))


def _raise_descriptor_limit() -> None:
    """Proxies and nemeses hold thousands of connections."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def print_report(run: Run, report: Report, seed: int, path: Path) -> None:
    print(f"seed {seed}")
    for line in told_faults(run.names, run.faults):
        print(line)
    for line in report.summary():
        print(line)
    for line in explain(report.anomalies, path):
        print(line)
    for line in run.trouble:
        print(f"trouble: {line}")


def told_faults(names: Sequence[str], faults: nemesis.Faults) -> Iterator[str]:
    """Yields the lines that say which of `names` had their turn, and which did not, so that a run which met half of
    them is not taken for one that met all."""
    done = Counter(faults.done)
    counts = ", ".join(f"{name} {count}" for name, count in sorted(done.items()))
    yield f"faults {len(faults.done)}: {counts}"
    impossible = {name: faults.impossible[name] for name in sorted(faults.impossible) if not done[name]}
    for name, reason in impossible.items():
        yield f"not possible here: {name}: {reason}"
    if left := [name for name in names if not done[name] and name not in impossible]:
        yield f"no time for {len(left)}: {', '.join(left)}"


def main(options: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the fleet must not outlive us
    work_dir = Path(options.dir) if options.dir else Path(tempfile.mkdtemp(prefix="streamhouse-faults-"))
    work_dir.mkdir(parents=True, exist_ok=True)
    try:
        with progress.clients_log(work_dir / "clients.log"):
            passed = asyncio.run(judge(options, work_dir))
    except pytest.skip.Exception as missing:  # as the tests that share these servers say it
        print(f"error: {missing}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; history and logs so far are in {work_dir}", file=sys.stderr)
        return 130
    if passed and not options.dir:
        shutil.rmtree(work_dir)
    return 0 if passed else 1


async def judge(options: argparse.Namespace, work_dir: Path) -> bool:
    """Returns True if the run passed."""
    names: list[str] = options.nemesis
    which = f"all {len(names)} nemeses" if len(names) == len(nemeses.NEMESES) else ", ".join(names)
    print(f"seed {options.seed}, {options.minutes:g} minutes of {which}; history and logs in {work_dir}", flush=True)
    run = Run(work_dir, options.seed, names, options.minutes * 60)
    telling = asyncio.create_task(progress.tell(lambda: run.ends_s, run.faults.at_work, run.recorder.counts))
    try:
        await run.run()
    finally:
        telling.cancel()
        await asyncio.wait([telling])
    path = work_dir / "history.jsonl"
    report = check(history.read_history(path))
    print_report(run, report, options.seed, path)
    if report.anomalies or run.trouble or not report.complete:
        print(f"FAILED; everything needed to look into it is in {work_dir}")
        print(f"the same faults again: {again(options)}")
        return False
    print("PASSED")
    return True


def again(options: argparse.Namespace) -> str:
    """Returns the command that gives the same faults at the same places."""
    names = "all" if len(options.nemesis) == len(nemeses.NEMESES) else ",".join(options.nemesis)
    values = {"MINUTES": f"{options.minutes:g}", "SEED": str(options.seed), "NEMESIS": names}
    return " ".join(["make faults", *(f"{name}={shlex.quote(value)}" for name, value in values.items())])


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=_minutes, default=5.0, help="of faults; start and end come on top")
    parser.add_argument("--seed", type=_seed, default=random.SystemRandom().randrange(2**32), help="default: random")
    parser.add_argument("--nemesis", type=_nemeses, default="all", help="names with commas; `*` stands for anything")
    parser.add_argument("--dir", default="", help="kept in any case; default: a new one, kept after a failure")
    parser.add_argument("--list", action="store_true", help="print the nemeses, and what each does, and end")
    options = parser.parse_args(arguments)
    if options.dir and (Path(options.dir) / "history.jsonl").exists():
        parser.error(f"argument --dir: {options.dir} holds the history of another run")
    return options


def _minutes(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (minutes := float(text)) <= MINUTES_MAX:
            return minutes
    raise argparse.ArgumentTypeError(f"{text!r} is no number above 0 and up to {MINUTES_MAX}")


def _seed(text: str) -> int:
    with contextlib.suppress(ValueError):
        if (seed := int(text)) >= 0:
            return seed
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")


def _nemeses(text: str) -> list[str]:
    try:
        return nemeses.chosen(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


if __name__ == "__main__":
    restore_sigint()
    parsed = parse(sys.argv[1:])
    if parsed.list:
        print("\n".join(nemeses.described()))
        sys.exit(0)
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main(parsed))
    sys.exit(130)
