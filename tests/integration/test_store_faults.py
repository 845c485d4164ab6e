"""What an object store does on bad days, each of it once: the real S3 adapter against a real S3 API behind a proxy that
plays the fault. Durable writes wait, then are acknowledged; every record is registered exactly once.

Quotes guarantees G1 (nothing acknowledged is lost), G2 (an offset never changes its record), G6 (no silent damage) and
G7 (pressure is visible, never fatal) for an object store that is away, slow, throttling or lying.
"""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from shproto.v1 import coordinator_pb2, types_pb2
from shstore import ObjectStore, RetryingStore, RetryPolicy, StoreOptions, open_store
from shstore.errors import ObjectExists, StoreError
from shstore.open import configured_store
from shstore.settings import StoreSettings

from tests.faults.proxy import Direction, FaultProxy
from tests.faults.store_proxy import StoreFault, StoreProxy
from tests.integration.rivals import Rivals, rivals, until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

DURABLE, WAL = types_pb2.ACKS_DURABLE, types_pb2.ACKS_WAL
READ_TIMEOUT_MS = 1_000
LATENCY_MS = 10_000


class Noting:
    """The store, and the errors of its calls since `clear`. `tries`: of puts and gets that have begun."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self.clear()

    def clear(self) -> None:
        self.tries = 0
        self.errors: list[StoreError] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def put(self, key: str, parts: Sequence[bytes | memoryview], *, if_absent: bool = True) -> Any:
        return await self._noted(self._store.put(key, parts, if_absent=if_absent))

    async def get(self, key: str, *, at: int = 0, size_bytes: int | None = None) -> Any:
        return await self._noted(self._store.get(key, at=at, size_bytes=size_bytes))

    async def _noted(self, call: Any) -> Any:
        self.tries += 1
        try:
            return await call
        except StoreError as error:
            self.errors.append(error)
            raise


class Weather:
    """One bad day after the other."""

    def __init__(self, found: Rivals, link: FaultProxy, server: StoreProxy, store: Noting) -> None:
        self._rivals = found
        self._link = link
        self._server = server
        self._store = store

    async def write_through(self, name: str) -> None:
        """A durable write while the fault `name` lasts until it has been met."""
        before = len(self._rivals.acknowledged)
        writing = self.begin_write(name)
        await until(lambda: self._store.errors)
        assert not writing.done(), f"{name}: acknowledged by a store that has not answered"
        await self.end()
        assert await writing == before
        if name in ("lost", "late"):  # the first try took effect: the next one meets 412, and its own bytes
            assert [error for error in self._store.errors if isinstance(error, ObjectExists)], name

    def begin_write(self, name: str) -> asyncio.Task[int]:
        """A durable write under the fault `name`, which lasts until `end`."""
        self._store.clear()
        self._begin(name)
        return asyncio.create_task(self._rivals.produce("old", b"during " + name.encode(), DURABLE))

    async def end(self) -> None:
        await self._heal()

    async def read_through(self, name: str) -> None:
        self._store.clear()
        self._begin(name)
        reading = asyncio.create_task(self._rivals.read())
        await until(lambda: self._store.errors)
        assert not reading.done(), f"{name}: an answer out of thin air"
        await self._heal()
        assert await reading == (self._rivals.acknowledged, [])

    def _begin(self, name: str) -> None:
        if name == "silent":  # whether it took effect nobody hears in time
            self._link.hold(Direction.DOWN)
        elif name == "slow":
            self._link.delay(Direction.DOWN, 2 * READ_TIMEOUT_MS)
        else:
            self._server.begin(StoreFault(name), seconds=2 * READ_TIMEOUT_MS / 1000)

    async def _heal(self) -> None:
        self._server.heal()
        await self._link.heal()


WRITES = ("503", "500", "409", "unsent", "lost", "late", "truncated", "silent", "slow")
READS = ("503", "500", "lost", "truncated", "short", "whole", "silent")


def settings(storage: dict[str, str], address: str) -> StoreOptions:
    return StoreOptions(
        kind="s3",
        bucket=storage["STREAMHOUSE_S3_BUCKET"],
        endpoint=f"http://{address}",
        access_key=storage["STREAMHOUSE_S3_ACCESS_KEY"],
        secret_key=storage["STREAMHOUSE_S3_SECRET_KEY"],
        connect_timeout_ms=READ_TIMEOUT_MS,
        read_timeout_ms=READ_TIMEOUT_MS,
    )


@contextlib.asynccontextmanager
async def bad_weather(storage: dict[str, str], directory: Path) -> AsyncIterator[tuple[Rivals, Weather]]:
    server = StoreProxy(urlsplit(storage["STREAMHOUSE_S3_ENDPOINT"]).netloc)
    await server.start()
    link = FaultProxy("store", server.address)
    await link.start()
    store = Noting(open_store(settings(storage, link.address)))
    policy = RetryPolicy(base_delay_ms=50, throttled_base_delay_ms=50, max_delay_ms=500, throttled_max_delay_ms=500)
    retrying = RetryingStore(store, policy)
    try:
        async with rivals(storage["STREAMHOUSE_PG_DSN"], directory, DURABLE, store=retrying) as found:
            yield found, Weather(found, link, server, store)
    finally:
        await retrying.close()
        await link.stop()
        await server.stop()


async def test_g1_g2_g7_every_fault_of_the_store_ends_in_exactly_one_registration(
    storage: dict[str, str], tmp_path: Path
) -> None:
    async with bad_weather(storage, tmp_path) as (found, weather):
        for name in WRITES:
            await weather.write_through(name)
        assert await found.registered(1) == [(n, n + 1) for n in range(len(WRITES))]
        assert [len(results) for results in found.witness.judged.values()] == [1] * len(WRITES)
        assert await found.read() == (found.acknowledged, [])
        await found.check_registry()


async def test_g6_a_reader_gets_what_is_there_or_waits_whatever_the_store_does(
    storage: dict[str, str], tmp_path: Path
) -> None:
    async with bad_weather(storage, tmp_path) as (found, weather):
        for name in READS:
            await found.produce("old", b"to be read during " + name.encode(), DURABLE)
            await weather.read_through(name)


async def test_g7_what_the_store_refuses_is_an_error_in_status_until_it_is_taken(
    storage: dict[str, str], tmp_path: Path
) -> None:
    """Repeating does not help: somebody has to hear of it. Once the store takes it, the write is acknowledged."""
    async with bad_weather(storage, tmp_path) as (found, weather):

        async def is_shown() -> bool:
            status = await found.coordinator.api.get_status(coordinator_pb2.GetStatusRequest())
            return [item.reason for item in status.buffer_failures if "AccessDenied" in item.reason] != []

        writing = weather.begin_write("403")
        await until(is_shown)
        status = await found.coordinator.api.get_status(coordinator_pb2.GetStatusRequest())
        (failure,) = status.buffer_failures
        assert failure.reason.startswith("refused: S3 put_object at http://127.0.0.1:")
        assert (failure.agent_id, failure.attempt >= 1, failure.size_bytes > 0) == ("old", True, True)
        assert not writing.done()
        await weather.end()
        await writing
        status = await found.coordinator.api.get_status(coordinator_pb2.GetStatusRequest())
        assert not status.buffer_failures


async def everything_is_registered(found: Rivals) -> bool:
    return (await found.range(1)).registered_end == len(found.acknowledged)


async def test_g2_g7_ten_seconds_of_latency_make_everything_late_and_nothing_wrong(
    storage: dict[str, str], tmp_path: Path
) -> None:
    """With the time-outs that a service has by default: no try is given up, so nothing is uploaded twice either."""
    proxy = FaultProxy("store", urlsplit(storage["STREAMHOUSE_S3_ENDPOINT"]).netloc)
    await proxy.start()
    environ = {name: value for name, value in storage.items() if name.startswith("STREAMHOUSE_S3_")}
    store = configured_store(StoreSettings.load(environ | {"STREAMHOUSE_S3_ENDPOINT": f"http://{proxy.address}"}))
    try:
        async with rivals(storage["STREAMHOUSE_PG_DSN"], tmp_path, WAL, store=store) as found:
            proxy.delay(Direction.DOWN, LATENCY_MS)
            stored = asyncio.create_task(found.produce("old", b"durable", DURABLE))
            await until(lambda: proxy.passed_bytes[Direction.UP])  # the upload is on its way
            for number in range(20):  # the store is not in the way of these
                await found.produce("old", b"%d" % number, WAL)
            assert not stored.done()
            await stored
            assert await found.read() == (found.acknowledged, [])
            await proxy.heal()
            await until(functools.partial(everything_is_registered, found))
            assert set(map(len, found.witness.judged.values())) == {1}, "no span was offered twice"
            assert [info.key async for info in store.list("data/")] == await found.object_keys()
            await found.check_registry()
    finally:
        await store.close()
        await proxy.stop()
