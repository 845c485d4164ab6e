"""`streamhouse serve` where 512 MiB of memory is all there is: the kernel ends what takes more."""

import asyncio
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from streamhouse import Admin, Consumer, Producer

from tests.integration.control_group import MemoryGroup
from tests.integration.processes import EmbeddedProcess

MIB = 1024 * 1024
RECORD_BYTES = 3 * MIB
PARTITIONS = 8

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


@pytest.fixture
def group() -> Iterator[MemoryGroup]:
    try:
        made = MemoryGroup(f"streamhouse-test-{uuid.uuid4().hex}", 512 * MIB)
    except OSError as error:
        pytest.skip(f"this machine lets no control group with a memory limit be made: {error}")
    yield made
    made.remove()


async def produce(address: str, records: int) -> None:
    """One producer with default settings, as fast as it goes; each record is a batch."""
    async with Producer(address) as producer:
        value = os.urandom(RECORD_BYTES)
        futures = [await producer.send("large", value, partition=n % PARTITIONS) for n in range(records)]
        await asyncio.gather(*futures)


@pytest.mark.parametrize(("producers", "records"), [(1, 150), (10, 15)])
async def test_g7_default_producers_of_large_batches_are_no_end_of_a_small_machine(
    tmp_path: Path, group: MemoryGroup, producers: int, records: int
) -> None:
    server = EmbeddedProcess(tmp_path / "data", tmp_path)
    server.arguments = group.command(server.arguments)
    await server.start_serving()
    try:
        async with Admin(server.address) as admin:
            await admin.create_topic("large", partitions=PARTITIONS)
        await asyncio.gather(*(produce(server.address, records) for _ in range(producers)))
        seen = 0
        async with Consumer(server.address, ["large"], start="earliest", stop_at_end=True) as consumer:
            async for batch in consumer.batches():
                seen += len(batch)
        assert seen == producers * records
        assert server.is_running(), server.log_tail()
        assert f"memory: 512 MiB ({group.limit_path})" in server.log_path.read_text()
    finally:
        try:
            assert group.oom_kills == 0, f"the kernel ended {group.oom_kills} processes:\n{server.log_tail()}"
        finally:
            await server.stop(120)
