"""Fixtures of the client's tests: `platform` is a running cluster, `address` its host:port; `server` a cluster that
runs in another thread, for plain code."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.platform.cluster import Cluster, ThreadedCluster, in_thread


@pytest.fixture
async def platform(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with Cluster(tmp_path / "platform") as cluster:
        yield cluster


@pytest.fixture
def address(platform: Cluster) -> str:
    return platform.address


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ThreadedCluster]:
    """A cluster that runs in another thread, as a server would."""
    with in_thread(tmp_path / "server") as cluster:
        yield cluster
