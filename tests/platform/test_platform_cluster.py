"""The cluster that the tests of clients run against."""

from pathlib import Path

import pytest
from shproto.errors import Unavailable
from shruntime.server import RpcServer
from streamhouse import Producer
from streamhouse_ingest.adapters.wal_directory import WalDirectory
from streamhouse_segmenter.wiring import SegmenterService

from tests.platform.cluster import Cluster


async def test_a_start_that_fails_stops_what_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its port stayed taken, and its tasks ran on under the tests that followed."""
    cluster = Cluster(tmp_path)

    async def fail(service: SegmenterService, address: str) -> None:
        raise Unavailable("no segmenter")

    monkeypatch.setattr(SegmenterService, "start", fail)
    with pytest.raises(Unavailable, match="no segmenter"):
        await cluster.start()
    again = RpcServer(cluster.address, [])
    await again.bind()
    await again.stop(0)
    WalDirectory.open(tmp_path / "agent-1", "agent-1").close()


async def test_an_agent_forgets_batches_of_one_topic(tmp_path: Path) -> None:
    """Topics whose epochs differ made the call fail."""
    async with Cluster(tmp_path) as cluster:
        await cluster.create_topic("t", 1)
        await cluster.change_leader("t")
        await cluster.create_topic("other", 1)
        async with Producer(cluster.address) as producer:
            await producer.send_and_wait("other", b"v")
        cluster.forget_batches("other", 0, 0)
