"""`serve` on a disk that is full: where a start is possible it starts, where it is not one line says what is missing,
and nothing is left that a later start, with room, trips over."""

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from streamhouse import Admin, Consumer, Producer
from streamhouse_embedded.postgres import FIRST_START_BYTES, RESERVE_BYTES
from streamhouse_embedded.postgres_system import stop_orphans

from tests.integration import small_disk
from tests.integration.processes import EmbeddedProcess

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

KIB = 1024
DISK_BYTES = 400 * KIB * KIB


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "disk"
    directory.mkdir()
    if not small_disk.mount(directory, DISK_BYTES):
        pytest.skip("a small file system needs the right to mount")
    yield directory
    stop_orphans(directory / "data" / "postgres")
    small_disk.unmount(directory)


def fill_but(path: Path, left_bytes: int) -> None:
    """Fills the disk beside `path` but for left_bytes, whole pages."""
    spared = path.with_name("spared")
    spared.write_bytes(bytes(left_bytes))
    small_disk.fill(path)
    spared.unlink()


async def failed_start(data_dir: Path) -> str:
    """Returns the one line in which a start says why it cannot be."""
    command = [sys.executable, "-m", "streamhouse_cli", "serve", "--listen", "127.0.0.1:0", "--data-dir", str(data_dir)]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=-1)
    try:
        async with asyncio.timeout(120):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    errors = [line for line in err.decode().splitlines() if line.startswith("error: ")]
    assert (process.returncode, out, len(errors)) == (1, b"", 1), err.decode()
    assert b"Traceback" not in err
    return errors[0]


@pytest.mark.parametrize("left_kib", [0, 4, 8, KIB, 47 * KIB])
async def test_a_first_start_without_room_says_so_and_the_next_one_works(
    disk: Path, tmp_path: Path, left_kib: int
) -> None:
    fill_but(disk / "ballast", left_kib * KIB)
    said = await failed_start(disk / "data")
    assert str(disk / "data") in said
    assert "bytes left" in said
    if left_kib >= 16:  # before that not even the lock files have room
        assert f"{FIRST_START_BYTES:,}" in said
    (disk / "ballast").unlink()
    server = EmbeddedProcess(disk / "data", tmp_path)
    await server.start_serving()
    await server.stop()


@pytest.mark.parametrize("crash", [False, True])
async def test_a_platform_on_a_full_disk_starts_is_read_and_deleted_from(
    disk: Path, tmp_path: Path, crash: bool
) -> None:
    server = EmbeddedProcess(disk / "data", tmp_path)
    await server.start_serving()
    async with Admin(server.address) as admin, Producer(server.address) as producer:
        await admin.create_topic("t", partitions=1)
        await (await producer.send("t", b"kept"))
    if crash:
        server.kill()
        await asyncio.to_thread(stop_orphans, disk / "data" / "postgres")
    else:
        await server.stop()
    small_disk.fill(disk / "ballast")
    server = EmbeddedProcess(disk / "data", tmp_path)
    await server.start_serving()
    async with Admin(server.address) as admin:
        async with Consumer(server.address, ["t"], start="earliest", stop_at_end=True) as consumer:
            assert [record.value async for record in consumer] == [b"kept"]
        await admin.delete_topic("t")
        assert await admin.list_topics() == []
    await server.stop()


async def test_a_platform_without_a_reserve_says_what_its_start_needs(disk: Path, tmp_path: Path) -> None:
    server = EmbeddedProcess(disk / "data", tmp_path)
    await server.start_serving()
    await server.stop()
    (disk / "data" / "postgres.reserve").unlink()
    small_disk.fill(disk / "ballast")
    said = await failed_start(disk / "data")
    assert f"the disk of {disk / 'data' / 'postgres'} has 0 bytes left, and a start needs {RESERVE_BYTES:,}" in said
    (disk / "ballast").unlink()
    server = EmbeddedProcess(disk / "data", tmp_path)
    await server.start_serving()
    await server.stop()
    assert (disk / "data" / "postgres.reserve").stat().st_size == RESERVE_BYTES
