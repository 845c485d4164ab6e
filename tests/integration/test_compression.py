"""Batches of every codec, in one topic: taken, read from the leader, built into segments, read from them."""

from pathlib import Path
from typing import get_args

import pytest
from streamhouse import Admin, Consumer, Producer
from streamhouse.core.options import Compression

from tests.integration.processes import EmbeddedProcess

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

COUNT = 5_000


async def read(address: str) -> list[bytes | None]:
    async with Consumer(address, ["t"], start="earliest", stop_at_end=True) as consumer:
        return [record.value async for record in consumer]


async def test_batches_of_every_codec_are_read_back_from_the_log_and_from_segments(tmp_path: Path) -> None:
    server = EmbeddedProcess(tmp_path / "data", tmp_path)
    await server.start_serving()
    sent: list[bytes | None] = []
    try:
        async with Admin(server.address) as admin:
            await admin.create_topic("t", partitions=1)
        for compression in get_args(Compression):
            async with Producer(server.address, acks="wal", compression=compression) as producer:
                values = [b'{"codec": "%s", "number": %d}' % (compression.encode(), at) for at in range(COUNT)]
                await (await producer.send_many("t", values))  # a batch that segments keep as it is
                await producer.send_and_wait("t", values[0])  # one that is merged
                sent += [*values, values[0]]
        assert await read(server.address) == sent
        async with Producer(server.address, acks="durable") as producer:
            await producer.send_and_wait("t", b"everything before is in segments with this")
        sent.append(b"everything before is in segments with this")
    finally:
        code = await server.stop()
    assert code == 0, server.log_tail()
    server = EmbeddedProcess(tmp_path / "data", tmp_path)
    await server.start_serving()
    try:
        assert await read(server.address) == sent
    finally:
        await server.stop()
