"""PostgreSQL is lost entirely, and the platform comes back from a backup, the object store and the agents' logs.

Quotes guarantees G1 (nothing acknowledged is lost), G2 (an offset never changes its record, and is never given out
again), G3 (order, without skipping an acknowledged record) and G8 (nothing that is needed is deleted).
"""

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
from shstore.open import configured_store
from shstore.settings import StoreSettings
from streamhouse import Admin, Consumer, Producer
from streamhouse_cli.services import load_all_settings
from streamhouse_segmenter.core.history import MARK_KEY, HistoryMark

from tests.integration.cluster import Cluster
from tests.integration.processes import EmbeddedProcess

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

PATIENCE_S = 90
"""Of every wait; nothing here depends on how long one takes."""
PARTITIONS = 2
GROUP = "billing"
REPLICAS = {"coordinator": 1, "query": 1, "segmenter": 1}
Acknowledged = dict[tuple[str, int], dict[int, bytes]]


async def until(ask: Callable[[], Any], met: Callable[[Any], bool]) -> Any:
    async with asyncio.timeout(PATIENCE_S):
        while not met(answer := await ask()):
            await asyncio.sleep(0.1)
    return answer


async def new_database(dsn: str) -> str:
    """The DSN of another, empty one on the same server; the old one is dropped with all there is in it."""
    name = f"own-{secrets.token_hex(8)}"
    url = urlsplit(dsn)
    connection = await asyncpg.connect(url._replace(path="/postgres").geturl())
    try:
        await connection.execute(f'DROP DATABASE "{url.path[1:]}" WITH (FORCE)')
        await connection.execute(f'CREATE DATABASE "{name}"')
    finally:
        await connection.close()
    return url._replace(path=f"/{name}").geturl()


async def cli(environ: Mapping[str, str], *arguments: str) -> Any:
    """The JSON that a command prints."""
    command = [sys.executable, "-m", "streamhouse_cli", *arguments, "--json"]
    done = await asyncio.to_thread(subprocess.run, command, env=dict(environ), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


class Clients:
    """What producers were told, and what readers find, at `address`."""

    def __init__(self) -> None:
        self.acknowledged: Acknowledged = {}

    @property
    def address(self) -> str:
        raise NotImplementedError

    async def create(self, topic: str, **options: Any) -> None:
        async with Admin(self.address) as admin:
            await admin.create_topic(topic, partitions=PARTITIONS, **options)
            await until(lambda: admin.describe_topic(topic), lambda d: all(p.leader_agent_id for p in d.partitions))

    async def produce(self, topic: str, what: str, count: int, acks: Any) -> None:
        """So many records to each partition; an offset that was acknowledged before is a failure."""
        async with Producer(self.address, acks=acks) as producer:
            for partition in range(PARTITIONS):
                values = [f"{what} {n}".encode() for n in range(count)]
                sent = await (await producer.send_many(topic, values, partition=partition))
                known = self.acknowledged.setdefault((topic, partition), {})
                for offset, value in zip(sent.offsets.tolist(), values, strict=True):
                    assert offset not in known, f"{topic}/{partition}: offset {offset} was given out again"
                    known[offset] = value

    async def read(self, topic: str, partition: int, count: int) -> dict[int, bytes | None]:
        """The first `count` records; the order of a reader, each offset once."""
        found: dict[int, bytes | None] = {}
        async with (
            asyncio.timeout(PATIENCE_S),
            Consumer(self.address, assign=[(topic, partition)], start="earliest") as consumer,
        ):
            async for record in consumer:
                assert record.offset > max(found, default=-1), "ascending"
                found[record.offset] = record.value
                if len(found) == count:
                    return found
        raise AssertionError("the consumer ended")

    async def check_all(self) -> None:
        for (topic, partition), known in self.acknowledged.items():
            assert await self.read(topic, partition, len(known)) == known, f"{topic}/{partition}"


class Platform(Clients):
    """Clusters one after the other over the same agents' disks."""

    def __init__(self, storage: Mapping[str, str], work_dir: Path) -> None:
        super().__init__()
        self.storage = dict(storage)
        self.work_dir = work_dir
        self.cluster = self._cluster()

    def _cluster(self) -> Cluster:
        common = {
            **self.storage,
            # What is not asked to be durable stays in the log for as long as a test takes.
            "STREAMHOUSE_SEAL_AGE_MS": "600000",
            "STREAMHOUSE_SCAN_INTERVAL_MS": "500",
        }
        return Cluster(common, self.work_dir, REPLICAS)

    @property
    def environ(self) -> dict[str, str]:
        """Of a service, so that a command knows database and object store."""
        return dict(self.cluster.services["segmenter-1"].environ) | self.storage

    @property
    def address(self) -> str:
        return self.cluster.bootstrap

    async def start(self) -> None:
        self.cluster = self._cluster()
        await self.cluster.start()

    async def restart_agent(self, name: str) -> None:
        """kill -9 and start: new epochs."""
        self.cluster.services[name].kill()
        self.cluster.services[name].start()
        await self.cluster.services[name].wait_serving(self.cluster.addresses[name])

    async def lose_postgresql(self) -> None:
        self.cluster.kill_all()
        self.storage["STREAMHOUSE_PG_DSN"] = await new_database(self.storage["STREAMHOUSE_PG_DSN"])


async def test_postgresql_is_lost_and_everything_acknowledged_comes_back(
    storage: dict[str, str], tmp_path: Path
) -> None:
    platform = Platform(storage, tmp_path)
    try:
        await before_the_loss(platform)
        await platform.lose_postgresql()
        planned = await cli(platform.environ, "restore", "--dry-run")
        report = await cli(platform.environ, "restore", "--yes")
        same = ("backup", "topics", "segments", "adopted_segments", "adopted_records", "unrecovered_ranges")
        assert [planned[name] for name in same] == [report[name] for name in same]
        assert report["adopted_records"] >= 60 and report["recovered_topics"] == ["late"], report
        assert not report["missing_segments"] and not report["lost_spans"] and not report["stranded_segments"], report
        await after_the_loss(platform)
        await platform.cluster.stop()
    finally:
        platform.cluster.kill_all()


async def before_the_loss(platform: Platform) -> None:
    await platform.start()
    await platform.create("orders")
    await platform.create("payments", min_acks="durable")
    await platform.produce("orders", "stored", 10, "durable")
    await platform.produce("orders", "in the log", 10, "wal")
    await platform.produce("payments", "paid", 10, "durable")
    async with Consumer(platform.address, ["orders"], group=GROUP, start="earliest", auto_commit=False) as consumer:
        for _ in range(10):
            await anext(consumer)
        await consumer.commit()
    await cli(platform.environ, "backup")
    # From here on the backup knows nothing.
    await platform.produce("orders", "stored later", 10, "durable")
    await platform.produce("payments", "paid later", 10, "durable")
    await platform.create("late")
    await platform.produce("late", "later topic", 10, "durable")
    await platform.produce("orders", "in the log later", 10, "wal")
    await platform.restart_agent("ingest-1")
    await platform.produce("orders", "new epoch, stored", 10, "durable")
    await platform.produce("orders", "new epoch, in the log", 10, "wal")


async def after_the_loss(platform: Platform) -> None:
    await platform.start()
    waiting = await cli(platform.environ, "restore", "--complete", "--dry-run", "--bootstrap", platform.address)
    assert waiting["agents"] == ["ingest-1", "ingest-2"] and waiting["unrecovered_ranges"]
    await cli(platform.environ, "restore", "--complete", "--yes", "--bootstrap", platform.address)
    before = {key: max(known) for key, known in platform.acknowledged.items()}
    for topic in ("orders", "payments", "late"):
        await platform.produce(topic, "after", 5, "durable")
    for key, last in before.items():
        after = [at for at, value in platform.acknowledged[key].items() if value.startswith(b"after")]
        assert min(after) > last + 2**39, "far behind all that may have been given out"
    await platform.check_all()
    await the_group_goes_on(platform)
    found = await cli(platform.environ, "verify", "--bootstrap", platform.address)
    assert found["findings"] == []
    await the_sweep_deletes_nothing_that_is_needed(platform)


async def the_sweep_deletes_nothing_that_is_needed(platform: Platform) -> None:
    """G8: not for a week, and then only what no segment lies in."""
    sweep = ("sweep", "--yes", "--grace-ms", "1000", "--confirm-ms", "0", "--bootstrap", platform.address)
    with pytest.raises(AssertionError, match="restored not long ago"):
        await cli(platform.environ, *sweep)
    load_all_settings()  # the environment is a segmenter's
    store = configured_store(StoreSettings.load(platform.environ))
    mark, _ = HistoryMark.decode(await store.get(MARK_KEY))
    left_over = "data/left.over/0/00000000000000000000-1-a.seg"
    await store.put(left_over, [b"of an upload that was cut off"])
    await store.put(MARK_KEY, [replace(mark, sweep_from_ms=0).encode()], if_absent=False)  # a week later
    objects = [info.key async for info in store.list("")]
    # Noticed by one sweep, deleted by another; the left over object is, with time.
    await until(lambda: cli(platform.environ, *sweep), lambda report: report["deleted"] > 0)
    kept = [info.key async for info in store.list("")]
    await store.close()
    assert left_over not in kept and len(kept) >= len(objects) - 2, "at most a leftover of the test's own kills besides"
    found = await cli(platform.environ, "verify", "--grace-ms", "0", "--bootstrap", platform.address)
    assert [item for item in found["findings"] if item["kind"] != "unregistered"] == []
    await platform.check_all()


async def the_group_goes_on(platform: Platform) -> None:
    """Where it had committed at the time of the backup."""
    known = {key: values for key, values in platform.acknowledged.items() if key[0] == "orders"}
    seen: set[tuple[str, int, int]] = set()
    total = sum(map(len, known.values())) - 10
    async with (
        asyncio.timeout(PATIENCE_S),
        Consumer(platform.address, ["orders"], group=GROUP, start="earliest", auto_commit=False) as consumer,
    ):
        async for record in consumer:
            place = (record.topic, record.partition, record.offset)
            assert place not in seen and known[place[:2]][record.offset] == record.value
            seen.add(place)
            if len(seen) == total:
                return


async def test_an_old_dump_in_the_place_of_the_database_is_refused_and_a_restore_helps(
    storage: dict[str, str], tmp_path: Path
) -> None:
    platform = Platform(storage, tmp_path)
    try:
        await platform.start()
        await platform.create("orders")
        await platform.produce("orders", "stored", 10, "durable")
        await cli(platform.environ, "backup")
        await platform.cluster.stop()
        current, dump = platform.storage["STREAMHOUSE_PG_DSN"], await copy_of(platform.storage["STREAMHOUSE_PG_DSN"])
        await platform.start()
        await platform.produce("orders", "stored later", 10, "durable")
        await platform.produce("orders", "in the log", 10, "wal")
        platform.cluster.kill_all()
        await agents_refuse(platform, dump)
        platform.storage["STREAMHOUSE_PG_DSN"] = current
        await platform.lose_postgresql()
        await agents_refuse(platform, platform.storage["STREAMHOUSE_PG_DSN"])
        platform.storage["STREAMHOUSE_PG_DSN"] = await new_database(platform.storage["STREAMHOUSE_PG_DSN"])
        await cli(platform.environ, "restore", "--yes")
        await platform.start()
        await cli(platform.environ, "restore", "--complete", "--yes", "--bootstrap", platform.address)
        await platform.produce("orders", "after", 5, "wal")
        await platform.check_all()
    finally:
        platform.cluster.kill_all()


async def copy_of(dsn: str) -> str:
    """The DSN of a copy of the database, which nobody may be using."""
    name = f"own-{secrets.token_hex(8)}"
    url = urlsplit(dsn)
    connection = await asyncpg.connect(url._replace(path="/postgres").geturl())
    try:
        await connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{url.path[1:]}"')
    finally:
        await connection.close()
    return url._replace(path=f"/{name}").geturl()


async def agents_refuse(platform: Platform, dsn: str) -> None:
    """Over this database no agent works, and none drops anything of its log."""
    platform.storage["STREAMHOUSE_PG_DSN"] = dsn
    platform.cluster = platform._cluster()
    names = ("coordinator-1", "ingest-1", "ingest-2")
    paths = list(platform.work_dir.glob("ingest-*/*.wal"))
    before = {path: path.read_bytes().rstrip(b"\0") for path in paths}  # a start gives the space ahead back
    assert before, "there is something to lose"
    for name in names:
        platform.cluster.services[name].start()
    for name in names[1:]:
        service = platform.cluster.services[name]
        start = len(service.log_tail(10**9))

        async def said(service: Any = service, start: int = start) -> str:
            return str(service.log_tail(10**9))[start:]

        await until(said, lambda text: "streamhouse restore" in text)
        assert service.is_running(), "it keeps asking"
    platform.cluster.kill_all()
    assert {path: path.read_bytes().rstrip(b"\0") for path in paths} == before


def _with_children(pid: int) -> list[int]:
    return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def _is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


class Embedded(Clients):
    """`streamhouse serve` on a directory."""

    def __init__(self, work_dir: Path, **environ: str) -> None:
        super().__init__()
        self.data_dir = work_dir / "data"
        self.postgres = self.data_dir / "postgres"
        self.server = EmbeddedProcess(self.data_dir, work_dir, {"STREAMHOUSE_SEAL_AGE_MS": "600000", **environ})

    @property
    def address(self) -> str:
        return self.server.address

    async def cli(self, *arguments: str) -> Any:
        return await cli(self.server.environ, *arguments)

    async def kill(self) -> None:
        """Returns when nothing of PostgreSQL runs any more: its checkpointer may still write into the directory, by its
        name, after the server itself was killed."""
        note = self.postgres / "postmaster.pid"
        running = note.exists()  # else it had not been started yet
        pids = _with_children(int(note.read_text().splitlines()[0])) if running else []
        self.server.kill()
        if running:
            with contextlib.suppress(ProcessLookupError):  # it ends with its parent, by itself
                os.kill(pids[0], signal.SIGKILL)

        async def alive() -> list[int]:
            return [pid for pid in pids if _is_running(pid)]

        await until(alive, lambda found: not found)

    async def lose_postgresql(self) -> None:
        await self.kill()
        shutil.rmtree(self.postgres)

    def objects(self) -> set[str]:
        """Keys of what segments may lie in."""
        root = self.data_dir / "objects" / "objects"
        return {str(path.relative_to(root)) for part in ("data", "mixed") for path in (root / part).rglob("*.seg")}

    def mark(self) -> HistoryMark:
        """What the store has seen of the metadata's history."""
        mark, _ = HistoryMark.decode((self.data_dir / "objects" / "objects" / MARK_KEY).read_bytes())
        return mark

    async def refused(self, *arguments: str) -> str:
        """What a command says that ends with exit 1, once the server answers."""

        async def said() -> tuple[int, str]:
            command = [sys.executable, "-m", "streamhouse_cli", *arguments, "--bootstrap", self.address]
            done = await asyncio.to_thread(
                subprocess.run, command, env=self.server.environ, capture_output=True, text=True
            )
            return done.returncode, done.stdout + done.stderr

        code, text = await until(said, lambda answer: "nothing answers" not in answer[1])
        assert code == 1, text
        return str(text)


async def test_serve_comes_back_without_its_postgresql(tmp_path: Path) -> None:
    platform = Embedded(tmp_path)
    place = ("--data-dir", str(platform.data_dir))
    await platform.server.start_serving()
    try:
        await platform.create("orders")
        await platform.produce("orders", "stored", 10, "durable")
        taken = await platform.cli("backup", "--keep", "2", *place)
        await platform.produce("orders", "stored later", 10, "durable")
        await platform.produce("orders", "in the log", 10, "wal")
        await platform.lose_postgresql()
        assert [item["name"] for item in await platform.cli("backup", "--list", *place)] == [taken["name"]]
        report = await platform.cli("restore", "--yes", *place)
        assert (report["backup"], report["adopted_records"]) == (taken["name"], 10 * PARTITIONS)
        await platform.server.start_serving()
        waiting = await platform.cli("restore", "--complete", "--yes", "--bootstrap", platform.address)
        assert waiting["agents"] == ["embedded"]
        await platform.produce("orders", "after", 5, "wal")
        await platform.check_all()
        found = await platform.cli("verify", *place, "--bootstrap", platform.address)
        assert found["findings"] == []
    finally:
        assert await platform.server.stop() == 0


SWEEPING = {
    "STREAMHOUSE_RETENTION_INTERVAL_MS": "100",  # so often the history is marked in the store
    "STREAMHOUSE_ORPHAN_SWEEP_INTERVAL_MS": "200",
    "STREAMHOUSE_ORPHAN_GRACE_MS": "1000",
    "STREAMHOUSE_ORPHAN_CONFIRM_MS": "0",
}


async def test_an_old_data_directory_of_postgresql_is_refused_and_nothing_is_deleted(tmp_path: Path) -> None:
    """G8: the files of PostgreSQL as they were some time ago, under a store that has seen what came after."""
    platform = Embedded(tmp_path, **SWEEPING)
    old, newest = tmp_path / "postgres-old", tmp_path / "postgres-newest"
    await platform.server.start_serving()
    try:
        await platform.create("orders")
        await platform.produce("orders", "stored", 10, "durable")
        assert await platform.server.stop() == 0
        copy_files(platform.postgres, old)
        known = platform.objects()
        await platform.server.start_serving()
        await platform.produce("orders", "stored later", 10, "durable")
        await the_store_has_seen_everything(platform)
        await platform.kill()
        platform.postgres.rename(newest)
        copy_files(old, platform.postgres)

        kept = platform.objects()
        assert known < kept, "there is something that the old files do not know"
        await everything_refuses(platform, kept - known)
        assert platform.objects() == kept

        await platform.kill()
        shutil.rmtree(platform.postgres)
        newest.rename(platform.postgres)
        await platform.server.start_serving()
        await platform.check_all()
        found = await platform.cli("verify", "--data-dir", str(platform.data_dir), "--bootstrap", platform.address)
        assert found["findings"] == []
        assert await platform.server.stop() == 0
    finally:
        if platform.server.is_running():
            await platform.kill()


def copy_files(source: Path, target: Path) -> None:
    """With their owner, who may be another user."""
    subprocess.run(["cp", "-a", str(source), str(target)], check=True)


async def the_store_has_seen_everything(platform: Embedded) -> None:
    async with Admin(platform.address) as admin:
        position = (await admin.status()).events_position

    async def mark() -> HistoryMark:
        return platform.mark()

    await until(mark, lambda found: found.position >= position)


async def everything_refuses(platform: Embedded, later: set[str]) -> None:
    """The agent, every sweep, and verify, which names the objects that were registered `later`."""
    platform.server.start()
    place = ("--data-dir", str(platform.data_dir))
    for how in ("--dry-run", "--yes"):
        said = await platform.refused("sweep", how, *place)
        assert "orphan sweep refused" in said and "streamhouse restore" in said
        assert f"has seen event {platform.mark().position} " in said and "PostgreSQL stands at event " in said

    async def log() -> str:
        return platform.server.log_tail(10**9)

    await until(
        log, lambda text: "orphan sweep refused" in text and "cannot open a session yet: the metadata went back" in text
    )
    said = await platform.refused("verify", *place, "--grace-ms", "0", "--json")
    found = json.loads(said.rpartition("error: ")[0])
    assert found["findings"][0]["kind"] == "outdated"
    unregistered = {item["object_key"] for item in found["findings"] if item["kind"] == "unregistered"}
    assert unregistered == later
