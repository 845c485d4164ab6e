"""An agent knows which metadata its log goes with, and works over no other."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from shformat import ProducerStamp
from shproto import errors
from shproto.v1 import coordinator_pb2 as pb
from streamhouse_ingest.adapters.wal_note import SLOT_BYTES, HistoryNote
from streamhouse_ingest.ports import Seen, WalDirectoryError

from services.ingest.tests.ingest_agents import eventually, kill, started, wal_files
from services.ingest.tests.ingest_world import World, new_world, segmenting
from services.ingest.tests.test_ingest_service import DURABLE, beats, led, request, running
from tests.platform.coordinator import Metadata
from tests.platform.disk import full_disk


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with new_world(heartbeat_ms=20) as world:
        await world.create_topic(partitions=2)
        yield world


def noted(directory: Path) -> tuple[str, int]:
    seen = HistoryNote(directory / "history").read()
    return seen.history_id, seen.position


def noted_sessions(world: World) -> list[pb.OpenSessionRequest]:
    """Returns the list of all that is asked of OpenSession from now on, refused or not."""
    noted, open_session = [], world.coordinator.open_session

    async def note(request: pb.OpenSessionRequest) -> pb.OpenSessionResponse:
        noted.append(request)
        return await open_session(request)

    world.coordinator.open_session = note
    return noted


async def test_the_log_keeps_what_it_has_heard_of_before_it_drops_anything(tmp_path: Path, world: World) -> None:
    limits = {"wal_file_bytes": 65536, "wal_bytes_max": 262144, "wal_group_bytes_max": 65536, "seal_bytes": 65536}
    async with running(tmp_path, world.coordinator, **limits) as service, segmenting(world, service):
        history_id, opened_at = noted(tmp_path)
        assert history_id == "memory"
        for _ in range(4):
            await service.api.produce(request(os.urandom(50_000), acks=DURABLE))
        await eventually(lambda: not (tmp_path / f"{1:020d}.wal").exists())
        assert noted(tmp_path)[1] > opened_at, "up to the registrations that freed the file"


async def test_g7_a_full_disk_does_not_end_an_agent_that_could_give_its_log_away(tmp_path: Path, world: World) -> None:
    """Found by simulation: it ended, and could not start again, over the note."""
    async with running(tmp_path, world.coordinator) as service:
        with full_disk(10):
            await world.create_topic("more")
            position = world.position
            await beats(world)
            assert not service.tasks.failed.is_set() and noted(tmp_path)[1] < position
        await eventually(lambda: noted(tmp_path)[1] >= position)


async def test_metadata_that_went_back_is_asked_again_until_it_is_right(tmp_path: Path, world: World) -> None:
    async with running(tmp_path, world.coordinator) as service, segmenting(world, service):
        await service.api.produce(request(b"a", acks=DURABLE))
        await service.api.produce(request(b"b"))
    dump, opened = world.dump(), noted_sessions(world)
    world.restore(Metadata(world.clock, "of a new and empty database").tables)
    starting = asyncio.create_task(started(tmp_path, world.coordinator))
    await eventually(lambda: len(opened) > 2)
    assert not starting.done() and wal_files(tmp_path), "nothing is led, nothing is dropped"
    assert opened[-1].history_id == "memory" and opened[-1].seen_position > 0
    world.restore(dump)
    service = await starting
    await led(service)
    await kill(service)


async def test_the_whole_log_is_told_with_where_it_begins(tmp_path: Path, world: World) -> None:
    async with running(tmp_path, world.coordinator) as service:
        await service.api.produce(request(b"a", b"b"))
    async with running(tmp_path, world.coordinator):
        ends = [
            (end.epoch, end.first_offset, end.end_offset)
            for end in world.coordinator.requests["open_session"][-1].wal_ends
        ]
        assert ends == [(1, 0, 2)]


async def test_a_producer_of_before_the_restore_is_refused(tmp_path: Path, world: World) -> None:
    world.allocate_producer_ids_from(1000)
    async with running(tmp_path, world.coordinator) as service:
        with pytest.raises(errors.UnknownProducer, match="before the metadata was restored"):
            await service.api.produce(request(b"a", stamp=ProducerStamp(999, 0, 0)))
        assert (await service.api.produce(request(b"a", stamp=ProducerStamp(1000, 0, 0)))).base_offset == 0
        assert (await service.api.produce(request(b"b"))).base_offset == 1


async def test_a_damaged_note_is_no_reason_to_trust_anybody(tmp_path: Path, world: World) -> None:
    (tmp_path / "history").write_text("nonsense")
    with pytest.raises(WalDirectoryError, match="not a note of a history"):
        await started(tmp_path, world.coordinator)


@pytest.mark.long
def test_of_a_torn_write_the_note_before_is_left(tmp_path: Path) -> None:
    path = tmp_path / "history"
    note = HistoryNote(path)
    for position in range(1, 6):
        note.write(Seen("h", position))
        assert HistoryNote(path).read() == Seen("h", position)
    whole = path.read_bytes()
    found = set()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        found.add(HistoryNote(path).read())
    assert found == {Seen("h", 5), Seen("h", 4)}
    again = HistoryNote(path)
    again.write(Seen("h", again.read().position + 2))
    assert HistoryNote(path).read().position in (6, 7)


@pytest.mark.parametrize(
    "content", [b"", b"x", bytes(2 * SLOT_BYTES), bytes(range(256)) * 4], ids=["empty", "short", "zeros", "other"]
)
def test_what_was_never_a_note_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "history").write_bytes(content)
    with pytest.raises(WalDirectoryError, match="not a note of a history"):
        HistoryNote(tmp_path / "history").read()
