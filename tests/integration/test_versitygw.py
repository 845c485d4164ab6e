"""A second S3 server beside moto: versitygw, which holds multipart uploads to what they were created for.

Quotes guarantees G1 (nothing acknowledged is lost) and G8 (no orphans, no dangling). The contract of every store runs
against it as well: libs/shstore/tests/test_shstore_contract.py.
"""

import asyncio
import os
import random
from pathlib import Path

import pytest
from shproto.v1 import types_pb2
from shruntime.memory import MIB
from shstore import ObjectExists
from shstore.open import configured_store
from shstore.settings import StoreSettings

from tests.integration.rivals import rivals
from tests.integration.servers import Server, own_storage

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

THRESHOLD_BYTES = StoreSettings.model_fields["s3_multipart_threshold_bytes"].default


async def test_g1_a_slice_above_the_multipart_threshold_is_acknowledged_durably_and_read_back(
    postgres: Server, versitygw: Server, tmp_path: Path
) -> None:
    """With the settings that a service has by default."""
    environ = own_storage(postgres, versitygw)
    store = configured_store(StoreSettings.load({name: value for name, value in environ.items() if "_S3_" in name}))
    rng = random.Random(5)
    try:
        async with rivals(environ["STREAMHOUSE_PG_DSN"], tmp_path, types_pb2.ACKS_WAL, store=store) as found:
            for _ in range(3):
                await found.produce("old", rng.randbytes(7 * MIB), types_pb2.ACKS_WAL)
            await found.produce("old", b"the last one", types_pb2.ACKS_DURABLE)
            keys = await found.object_keys()
            sizes = {info.key: info.size_bytes async for info in store.list("data/")}
            assert max(sizes.values()) > THRESHOLD_BYTES
            assert sorted(sizes) == keys, "an object without a segment, or a segment without its object"
            assert await found.read() == (found.acknowledged, [])
            await found.check_registry()
    finally:
        await store.close()


async def test_conditional_puts_listing_and_deletes_above_the_threshold(versitygw: Server) -> None:
    settings = StoreSettings.load(versitygw.settings | {"STREAMHOUSE_S3_PREFIX": os.urandom(4).hex()})
    store = configured_store(settings)
    body = random.Random(6).randbytes(THRESHOLD_BYTES + 1)
    try:
        racing = await asyncio.gather(
            *(store.put("data/large", [bytes([n]), body]) for n in range(3)), return_exceptions=True
        )
        (winner,) = [n for n, result in enumerate(racing) if not isinstance(result, BaseException)]
        assert sum(isinstance(result, ObjectExists) for result in racing) == 2
        assert await store.get("data/large", at=0, size_bytes=3) == bytes([winner]) + body[:2]
        assert await store.get("data/large", at=len(body) - 2) == body[-3:]
        await store.put("data/small", [b"x"])
        assert [info.key async for info in store.list("data/")] == ["data/large", "data/small"]
        await store.delete(["data/large", "data/never"])
        assert [info.key async for info in store.list("data/")] == ["data/small"]
    finally:
        await store.close()
