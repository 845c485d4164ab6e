"""A store that does not answer: readers hear of it before they give up, and go on where they were once it is back."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from shproto.errors import Unavailable
from shproto.rpc import Connection
from shproto.services import QueryClient
from shproto.v1 import query_pb2
from shruntime.server import RpcServer
from shstore import MemoryStore, RetryingStore, StoreUnavailable
from streamhouse_query import api
from streamhouse_query.wiring import QueryService

from services.query.tests.start_query import StartQuery
from services.query.tests.test_query_fetch import one_partition
from services.query.tests.test_query_subscribe import subscribed, until, values_in
from tests.platform.read_world import World, values_of


class BlackHole:
    """The store behind it, which answers no get before `answers` is set. Until then every try ends with `error`, if
    there is one."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self.answers = asyncio.Event()
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def get(self, key: str, *, at: int = 0, size_bytes: int | None = None) -> bytes:
        if self.error is not None and not self.answers.is_set():
            raise self.error
        await self.answers.wait()
        return await self._store.get(key, at=at, size_bytes=size_bytes)


@pytest.fixture
async def hole(platform: World) -> BlackHole:
    """Over a partition of which all is registered."""
    await one_partition(platform)
    await platform.produce(values_of(10))
    await platform.register()
    return BlackHole(platform.store)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def called(service: QueryService) -> AsyncIterator[QueryClient]:
    """Over gRPC, as a client calls."""
    server = RpcServer("127.0.0.1:0", [(query_pb2.DESCRIPTOR.services_by_name["Query"], service.api)])
    await server.start()
    client = QueryClient(Connection([server.address], timeout_ms=120_000))
    try:
        yield client
    finally:
        await client.close()
        await server.stop(0)


@contextlib.contextmanager
def giving_up_soon() -> Iterator[None]:
    """Calls whose callers have little time left, as the service sees it: they wait in truth, so that the machine may be
    as slow as it likes. That a service sees what is left is tested with its server."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "time_left_ms", lambda: 2_000.0)
        yield


def request(offset: int = 0) -> query_pb2.FetchRequest:
    return query_pb2.FetchRequest(topic="orders", offset=offset)


async def test_g7_a_fetch_says_why_before_its_caller_gives_up(hole: BlackHole, start_query: StartQuery) -> None:
    service = await start_query(store=RetryingStore(hole))
    async with called(service) as client:
        with giving_up_soon():
            silent = await client.fetch(request())
        assert (silent.next_offset, list(silent.batches)) == (0, [])
        assert silent.waiting_reason.startswith("orders/0: records from offset 0 on are in the object store")
        assert "has not answered within" in silent.waiting_reason
        hole.error = StoreUnavailable("S3 get_object at http://s3: Read timeout")
        hole.answers.set()  # of the first try, which still waits
        assert len((await client.fetch(request())).batches) == 1


async def test_g7_what_the_store_says_is_told(hole: BlackHole, start_query: StartQuery) -> None:
    hole.error = StoreUnavailable("S3 get_object at http://s3: Read timeout")
    service = await start_query(store=RetryingStore(hole))
    async with called(service) as client:
        with giving_up_soon():
            assert (await client.fetch(request())).waiting_reason.endswith("S3 get_object at http://s3: Read timeout")
        by_time = query_pb2.OffsetLookup(topic="orders", spec=query_pb2.OFFSET_SPEC_TIMESTAMP)
        said = r"not found within .* ms: S3 get_object at http://s3: Read timeout"
        with giving_up_soon(), pytest.raises(Unavailable, match=said):
            await client.lookup_offsets(query_pb2.LookupOffsetsRequest(lookups=[by_time]))


async def test_g7_a_subscriber_is_told_and_goes_on(hole: BlackHole, start_query: StartQuery) -> None:
    """As `consumer.waiting` shows it. The partition is not refused for it."""
    hole.error = StoreUnavailable("S3 get_object at http://s3: Read timeout")
    service = await start_query(store=RetryingStore(hole), subscribe_heartbeat_ms=200)
    async with subscribed(service, ("orders", 0, 0)) as responses:
        told = (await until(responses, lambda response: bool(response.waiting_reason)))[-1]
        assert not told.HasField("error")
        assert told.waiting_reason.endswith("S3 get_object at http://s3: Read timeout")
        assert told.next_offset == 0
        hole.answers.set()
        got = await until(responses, lambda response: bool(response.batches))
        assert values_in(got) == values_of(10)
        assert not got[-1].waiting_reason
