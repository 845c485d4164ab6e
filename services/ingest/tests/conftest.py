"""Fixtures of the write-ahead log's tests: `directory` is an opened directory without files."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from streamhouse_ingest.adapters.wal_directory import WalDirectory


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[WalDirectory]:
    opened = WalDirectory.open(tmp_path / "wal", "agent-1")
    yield opened
    opened.close()
