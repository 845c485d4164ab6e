"""What becomes of a DSN that is wrong: never a wait for ever without a word, never a password in a message."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
from shruntime.settings import SettingsError
from streamhouse_coordinator.adapters.postgres_hosts import by_host
from streamhouse_coordinator.settings import CoordinatorSettings
from streamhouse_coordinator.wiring import build
from streamhouse_embedded.postgres import EmbeddedPostgres
from streamhouse_embedded.postgres_system import RunAs, find_bin_dir

pytestmark = pytest.mark.long

Settings = Callable[..., Any]


@pytest.fixture
def by_password(tcp_dsn: str) -> str:
    """The DSN of a server that asks for a password."""
    return tcp_dsn


async def waits_saying(caplog: pytest.LogCaptureFixture, text: str) -> None:
    async with asyncio.timeout(60):
        while text not in caplog.text:
            await asyncio.sleep(0.02)


@pytest.mark.smoke
async def test_what_no_server_could_answer_is_an_error_of_settings() -> None:
    with pytest.raises(SettingsError, match=r"STREAMHOUSE_PG_DSN.*'mysql://me:\*\*\*@host/db'") as caught:
        CoordinatorSettings.load({"STREAMHOUSE_PG_DSN": "mysql://me:secret@host/db"})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("&sslmode=perhaps", "sslmode"),
        ("&connect_timeout=10", 'unrecognized configuration parameter "connect_timeout"'),
        ("&search_path=public&statement_timeout=soon", "statement_timeout"),
        ("&max_connections=3", "max_connections"),
    ],
)
async def test_an_option_that_nobody_knows_ends_the_start(dsn: str, options: str, said: str, fast: Settings) -> None:
    with pytest.raises(SettingsError, match=rf"pg_dsn \(STREAMHOUSE_PG_DSN\): .*{said}"):
        await build(fast(dsn + options)).start()


async def test_a_wrong_password_is_said_and_tried_again(
    by_password: str, fast: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    parts = urlsplit(by_password)
    wrong = by_password.replace(str(parts.password), "not-the-password")
    service = build(fast(wrong))
    start = asyncio.create_task(service.start())
    with caplog.at_level(logging.WARNING):
        await waits_saying(caplog, 'PostgreSQL refuses us: password authentication failed for user "postgres"')
    assert not start.done()
    connection = await asyncpg.connect(by_password)
    await connection.execute("ALTER USER postgres PASSWORD 'not-the-password'")
    await connection.close()
    await asyncio.wait_for(start, 60)
    assert "not-the-password" not in caplog.text
    await service.stop()


@pytest.mark.parametrize("checksums", [True, False], ids=["with", "without"])
async def test_g6_a_server_without_page_checksums_is_warned_of(
    tmp_path: Path, checksums: bool, fast: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    data_dir, programs = tmp_path / "data", tmp_path / "programs"
    server = EmbeddedPostgres(data_dir)
    await server.start()
    await server.stop()
    if not checksums:
        disable = RunAs.choose(find_bin_dir(), data_dir).command(
            find_bin_dir() / "pg_checksums", ["--disable", "-D", str(data_dir)]
        )
        assert await (await asyncio.create_subprocess_exec(*disable)).wait() == 0
        programs.mkdir()  # without pg_checksums, with which they would come back
        for name in ("initdb", "postgres"):
            (programs / name).symlink_to(find_bin_dir() / name)
        server = EmbeddedPostgres(data_dir, bin_dir=programs)
    service = build(fast(await server.start()))
    await service.start()
    await service.stop()
    await server.stop()
    assert ("PostgreSQL has no page checksums" in caplog.text) != checksums


@pytest.mark.smoke
async def test_a_database_that_is_made_later_is_waited_for(
    by_password: str, fast: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    service = build(fast(by_password.removesuffix("/postgres") + "/later"))
    start = asyncio.create_task(service.start())
    await waits_saying(caplog, 'PostgreSQL refuses us: database "later" does not exist')
    connection = await asyncpg.connect(by_password)
    await connection.execute("CREATE DATABASE later")
    await connection.close()
    await asyncio.wait_for(start, 60)
    await service.stop()


async def test_a_user_that_is_granted_later_is_waited_for(
    by_password: str, fast: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    connection = await asyncpg.connect(by_password)
    await connection.execute("CREATE USER streamhouse PASSWORD 'pass'")
    parts = urlsplit(by_password)
    service = build(fast(f"postgresql://streamhouse:pass@{parts.hostname}:{parts.port}/postgres"))
    start = asyncio.create_task(service.start())
    await waits_saying(caplog, "PostgreSQL refuses us: permission denied for schema public")
    await connection.execute("GRANT ALL ON SCHEMA public TO streamhouse")
    await connection.close()
    await asyncio.wait_for(start, 60)
    await service.stop()


@asynccontextmanager
async def silent_server() -> AsyncIterator[str]:
    """host:port of what takes connections and never says a word."""
    held: list[asyncio.StreamWriter] = []

    async def hold(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.append(writer)

    async with await asyncio.start_server(hold, "127.0.0.1", 0) as server:
        yield "127.0.0.1:{1}".format(*server.sockets[0].getsockname())
        for writer in held:
            writer.transport.abort()


async def test_a_server_that_is_silent_leaves_time_for_the_next(by_password: str, fast: Settings) -> None:
    async with silent_server() as silent:
        place = urlsplit(by_password).netloc.rpartition("@")[2]
        service = build(fast(by_password.replace(place, f"{silent},{place}"), pg_timeout_ms=1_000))
        await asyncio.wait_for(service.start(), 60)
        await service.stop()


async def test_it_says_of_each_server_what_is_wrong_with_it(
    by_password: str, fast: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """The only one that answers takes no writes."""
    connection = await asyncpg.connect(by_password)
    await connection.execute("ALTER DATABASE postgres SET default_transaction_read_only = on")
    await connection.close()
    async with silent_server() as silent:
        place = urlsplit(by_password).netloc.rpartition("@")[2]
        service = build(fast(by_password.replace(place, f"{silent},{place}"), pg_timeout_ms=500))
        start = asyncio.create_task(service.start())
        with caplog.at_level(logging.WARNING):
            await waits_saying(caplog, f"{silent}: no answer in time; {place}: takes no writes")
        start.cancel()
        await asyncio.wait([start])
        await service.stop()


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("dsn", "places"),
    [
        ("postgresql://u:p@db/x?sslmode=off", [("db", "postgresql://u:p@db/x?sslmode=off")]),
        ("postgresql:///x?host=/run", [("", "postgresql:///x?host=/run")]),
        (
            "postgresql://u:p,q@a:1,[::1]:2/x",
            [
                ("a:1", "postgresql://u:p,q@a:1/x?target_session_attrs=read-write"),
                ("[::1]:2", "postgresql://u:p,q@[::1]:2/x?target_session_attrs=read-write"),
            ],
        ),
        ("postgres://a,b?x=1", [(h, f"postgres://{h}?x=1&target_session_attrs=read-write") for h in "ab"]),
        (
            "postgres://a,b/x?target_session_attrs=any",
            [(h, f"postgres://{h}/x?target_session_attrs=any") for h in "ab"],
        ),
    ],
)
def test_several_servers_are_tried_one_by_one(dsn: str, places: list[tuple[str, str]]) -> None:
    assert by_host(dsn) == places
