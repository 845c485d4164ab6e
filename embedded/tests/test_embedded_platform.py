"""The embedded platform, started and stopped in the process of the test."""

import asyncio
import socket
from pathlib import Path

import pytest
from shruntime.server import check_listen
from streamhouse_embedded.settings import EmbeddedSettings
from streamhouse_embedded.wiring import EmbeddedPlatform


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


async def test_a_start_that_ends_while_it_waits_for_postgresql_leaves_port_and_directory_free(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dsn = f"postgresql://nobody@{free_address()}/none"
    settings = EmbeddedSettings.load({}, listen=free_address(), data_dir=tmp_path / "data", pg_dsn=dsn)
    for _ in range(2):
        caplog.clear()
        platform = EmbeddedPlatform(settings)
        starting = asyncio.create_task(platform.start())
        async with asyncio.timeout(60):
            while "waiting for postgresql" not in caplog.text:
                await asyncio.sleep(0.01)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        await check_listen(settings.listen)
        assert platform.tasks.error is None
