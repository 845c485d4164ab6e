"""Real ingest agents over the coordinator of a test."""

import asyncio
import os
from pathlib import Path
from typing import Any

from shformat import Records, decode_batch
from shproto.v1 import ingest_pb2
from shruntime.clock import Clock
from streamhouse_ingest.settings import IngestSettings
from streamhouse_ingest.wiring import IngestService, build


def settings(directory: object, **overrides: Any) -> IngestSettings:
    """Small and quick, everything else as in production."""
    values: dict[str, Any] = {
        "wal_dir": str(directory),
        "agent_id": "agent-1",
        "shutdown_timeout_ms": 60_000,
        "retry_first_ms": 5,
        "retry_max_ms": 20,
        "lease_margin_ms": 100,
    }
    return IngestSettings.load({}, **(values | overrides))


async def started(
    directory: object, coordinator: Any, *, clock: Clock | None = None, **overrides: Any
) -> IngestService:
    service = build(settings(directory, **overrides), coordinator, clock)
    await service.start("127.0.0.1:1")
    return service


async def kill(service: IngestService) -> None:
    """As kill -9 leaves it: nothing is sealed, settled or closed; the lock goes with the process."""
    running = service.agent.running()
    await service.tasks.stop()
    service.agent._thread.shutdown(wait=True)
    running.opened.unlock()
    if running.opened.wal._fd >= 0:
        os.close(running.opened.wal._fd)


async def eventually(condition: Any, timeout_s: float = 60.0) -> None:
    """Waits until `condition()` is true."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


def wal_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.wal"))


def flip_bit(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)


async def pull(
    service: IngestService, key: tuple[bytes, int, int], base: int, end: int, buffer_id: str = ""
) -> Records:
    request = ingest_pb2.PullSliceRequest(
        buffer_id=buffer_id, topic_id=key[0], partition=key[1], epoch=key[2], base_offset=base, end_offset=end
    )
    parts = [decode_batch(b) async for r in service.api.pull_slice(request) for b in r.batches]
    records = Records.concat(parts)
    assert (int(records.offsets[0]), int(records.offsets[-1]) + 1) == (base, end)
    return records
