"""Fixtures of ingest's tests."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from streamhouse_ingest.adapters.wal_directory import WalDirectory

from services.ingest.tests.ingest_world import World, new_world


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
