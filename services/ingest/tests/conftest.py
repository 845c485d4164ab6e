"""Fixtures of ingest's tests."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from streamhouse_ingest.adapters.wal_directory import WalDirectory

from services.ingest.tests.ingest_world import World, new_world
from tests.platform.virtual_time import virtual_time


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[WalDirectory]:
    """An opened directory without files."""
    opened = WalDirectory.open(tmp_path / "wal", "agent-1")
    yield opened
    opened.close()


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with new_world() as world:
        yield world


@pytest.fixture
async def no_time_passes() -> AsyncIterator[None]:
    """Waits take no time, and none passes while the log is written: deadlines of a few ms are only reached by waits."""
    with virtual_time():
        yield
