"""What becomes of a DSN that is wrong: never a wait for ever without a word, never a password in a message."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
from shruntime.settings import SettingsError
from streamhouse_coordinator.settings import CoordinatorSettings
from streamhouse_coordinator.wiring import build
from streamhouse_embedded.postgres import EmbeddedPostgres

Settings = Callable[..., Any]


@pytest.fixture
async def by_password(tmp_path: Path) -> AsyncIterator[str]:
    """The DSN of a server that asks for a password."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = EmbeddedPostgres(tmp_path / "data", port=port)
    yield await server.start()
    await server.stop()


async def waits_saying(caplog: pytest.LogCaptureFixture, text: str) -> None:
    async with asyncio.timeout(20):
        while text not in caplog.text:
            await asyncio.sleep(0.02)


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
    await asyncio.wait_for(start, 20)
    assert "not-the-password" not in caplog.text
    await service.stop()


async def test_a_database_that_is_made_later_is_waited_for(
    by_password: str, fast: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    service = build(fast(by_password.removesuffix("/postgres") + "/later"))
    start = asyncio.create_task(service.start())
    await waits_saying(caplog, 'PostgreSQL refuses us: database "later" does not exist')
    connection = await asyncpg.connect(by_password)
    await connection.execute("CREATE DATABASE later")
    await connection.close()
    await asyncio.wait_for(start, 20)
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
    await asyncio.wait_for(start, 20)
    await service.stop()
