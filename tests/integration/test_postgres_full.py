"""PostgreSQL's disk is full: it refuses what it cannot write, gives up, and may end. The coordinator waits for it."""

import asyncio
import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from shproto.errors import AWAY, StreamHouseError, Unavailable
from shproto.v1 import coordinator_pb2 as pb
from streamhouse_coordinator.settings import CoordinatorSettings
from streamhouse_coordinator.wiring import CoordinatorService, build
from streamhouse_embedded.postgres import EmbeddedPostgres, PostgresError

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

PATIENCE_S = 120
DISK = "192m"
LEFT_BYTES = 2 * 1024 * 1024


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that holds a new database and little more."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=0777", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small file system needs the right to mount: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(ballast: Path) -> None:
    """Leaves LEFT_BYTES of the file system."""
    with contextlib.suppress(OSError), ballast.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(1 << 20))
    with ballast.open("r+b") as file:
        file.truncate(max(0, ballast.stat().st_size - LEFT_BYTES))


async def create_topics(service: CoordinatorService, created: list[str]) -> list[StreamHouseError]:
    """Until three were refused; those that were not are in `created`."""
    refusals: list[StreamHouseError] = []
    while len(refusals) < 3:
        name = f"topic-{len(created) + len(refusals)}"
        try:
            await service.api.create_topic(pb.CreateTopicRequest(topic=name, partitions=500))
            created.append(name)
        except StreamHouseError as error:
            refusals.append(error)
    return refusals


async def start_again(server: EmbeddedPostgres) -> None:
    """If it ended with the disk; else it is left alone."""
    if server.pid is None:
        with contextlib.suppress(PostgresError):
            await server.stop()
        await server.start()


async def test_a_full_disk_is_an_absence_and_nothing_that_was_answered_is_lost(small_disk: Path) -> None:
    server = EmbeddedPostgres(small_disk / "data")
    service = build(CoordinatorSettings.load({}, pg_dsn=await server.start(), session_sweep_interval_ms=50))
    await service.start()
    created: list[str] = []
    ballast = small_disk / "ballast"
    try:
        await service.open_session("127.0.0.1:1")
        await service.api.create_topic(pb.CreateTopicRequest(topic="before", partitions=1))
        await asyncio.to_thread(fill, ballast)
        async with asyncio.timeout(PATIENCE_S):
            refusals = await create_topics(service, created)
        assert all(isinstance(error, Unavailable) and error.details["database"] == AWAY for error in refusals), refusals
        await asyncio.sleep(1)  # sweeps, polls and heartbeats go on
        assert not service._tasks.failed.is_set(), "the full disk has ended the coordinator"
        ballast.unlink()
        await start_again(server)
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    await service.api.create_topic(pb.CreateTopicRequest(topic="after", partitions=1))
                    break
                except Unavailable:
                    await asyncio.sleep(0.1)
        there = {topic.topic for topic in (await service.api.list_topics(pb.ListTopicsRequest())).topics}
        assert there >= {"before", *created, "after"}
        assert not service._tasks.failed.is_set()
    finally:
        await service.stop()
        ballast.unlink(missing_ok=True)
        await server.stop()
