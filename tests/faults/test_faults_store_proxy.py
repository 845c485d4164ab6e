"""The proxy in front of the object store plays each fault to the real S3 adapter, and is not there without one."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from shstore import ObjectStore, StoreOptions, open_store
from shstore.errors import BodyTruncated, ObjectExists, ObjectMissing, StoreCorrupt, StoreDenied, StoreUnavailable

from tests.faults import nemeses
from tests.faults.fleet import Fleet
from tests.faults.history import Recorder
from tests.faults.proxy import Direction, FaultProxy
from tests.faults.store_proxy import StoreFault, StoreProxy
from tests.integration import servers

pytestmark = pytest.mark.integration

READ_TIMEOUT_MS = 300
"""Of the one test that waits for it; others have time."""

BODY = bytes(range(256)) * 40
KEY = "data/a"


@pytest.fixture(scope="module")
def s3() -> Iterator[servers.Server]:
    server = servers.s3_server()
    yield server
    server.close()


@pytest.fixture
async def proxy(s3: servers.Server) -> AsyncIterator[StoreProxy]:
    made = StoreProxy(s3.url.removeprefix("http://"))
    await made.start()
    yield made
    await made.stop()


def settings(s3: servers.Server, address: str, read_timeout_ms: int = 15_000) -> StoreOptions:
    return StoreOptions(
        kind="s3",
        bucket=s3.settings["STREAMHOUSE_S3_BUCKET"],
        endpoint=f"http://{address}",
        access_key=s3.settings["STREAMHOUSE_S3_ACCESS_KEY"],
        secret_key=s3.settings["STREAMHOUSE_S3_SECRET_KEY"],
        read_timeout_ms=read_timeout_ms,
    )


@pytest.fixture
async def store(s3: servers.Server, proxy: StoreProxy) -> AsyncIterator[ObjectStore]:
    """Through the proxy; one attempt per call. Holds BODY under KEY."""
    made = open_store(settings(s3, proxy.address))
    await made.put(KEY, [BODY], if_absent=False)
    yield made
    proxy.heal()
    await made.delete([info.key async for info in made.list("")])
    await made.close()


@pytest.fixture
async def direct(s3: servers.Server) -> AsyncIterator[ObjectStore]:
    """The same store without the proxy."""
    made = open_store(settings(s3, s3.url.removeprefix("http://")))
    yield made
    await made.close()


async def keys(store: ObjectStore) -> list[str]:
    return [info.key async for info in store.list("data/")]


async def test_without_a_fault_the_proxy_is_not_there(store: ObjectStore, direct: ObjectStore) -> None:
    await store.put("data/b", [b"one", b"two"])
    with pytest.raises(ObjectExists):
        await store.put("data/b", [b"three"])
    for seen in (store, direct):
        assert await seen.get("data/b") == b"onetwo"
        assert await seen.get(KEY, at=1000, size_bytes=300) == BODY[1000:1300]
        assert (await seen.head(KEY)).size_bytes == len(BODY)
        assert await keys(seen) == [KEY, "data/b"]
    with pytest.raises(ObjectMissing):
        await store.get("data/c")
    await store.delete(["data/b"])
    assert await keys(direct) == [KEY]


async def test_many_calls_at_once(store: ObjectStore) -> None:
    assert await asyncio.gather(*(store.get(KEY, at=n, size_bytes=1) for n in range(50))) == [
        BODY[n : n + 1] for n in range(50)
    ]


async def test_denies(store: ObjectStore, direct: ObjectStore, proxy: StoreProxy) -> None:
    proxy.begin(StoreFault.DENIED)
    for call in (store.put("data/b", [b"x"]), store.get(KEY)):
        with pytest.raises(StoreDenied):
            await call
    assert await keys(direct) == [KEY]


@pytest.mark.parametrize(("fault", "throttled"), [(StoreFault.SLOW_DOWN, True), (StoreFault.ERROR, False)])
async def test_refuses_and_does_nothing(
    store: ObjectStore, direct: ObjectStore, proxy: StoreProxy, fault: StoreFault, throttled: bool
) -> None:
    proxy.begin(fault)
    for call in (store.put("data/b", [b"x"]), store.get(KEY), store.delete([KEY]), store.check()):
        with pytest.raises(StoreUnavailable) as caught:
            await call
        assert caught.value.throttled is throttled
    with pytest.raises(StoreUnavailable):
        await store.head(KEY)  # its answer has no body that could say more
    assert await keys(direct) == [KEY]
    assert proxy.touched[fault] == 5


async def test_a_conditional_write_meets_another(store: ObjectStore, direct: ObjectStore, proxy: StoreProxy) -> None:
    proxy.begin(StoreFault.CONFLICT)
    with pytest.raises(StoreUnavailable):
        await store.put("data/b", [b"x"])
    await store.put("data/c", [b"x"], if_absent=False)
    assert await keys(direct) == [KEY, "data/c"]


@pytest.mark.parametrize(("fault", "is_done"), [(StoreFault.UNSENT, False), (StoreFault.LOST, True)])
async def test_resets_before_or_after_the_write_took_effect(
    store: ObjectStore, direct: ObjectStore, proxy: StoreProxy, fault: StoreFault, is_done: bool
) -> None:
    proxy.begin(fault)
    with pytest.raises(StoreUnavailable):
        await store.put("data/b", [b"x"])
    assert ("data/b" in await keys(direct)) is is_done


async def test_success_is_answered_late(
    s3: servers.Server, store: ObjectStore, direct: ObjectStore, proxy: StoreProxy
) -> None:
    impatient = open_store(settings(s3, proxy.address, READ_TIMEOUT_MS))
    proxy.begin(StoreFault.LATE, seconds=3 * READ_TIMEOUT_MS / 1000)
    with pytest.raises(StoreUnavailable):
        await impatient.put("data/b", [b"x"])
    await impatient.close()
    assert await direct.get("data/b") == b"x"
    await store.put("data/c", [b"x"])  # who waits is told


async def test_a_body_ends_early(store: ObjectStore, proxy: StoreProxy) -> None:
    proxy.begin(StoreFault.TRUNCATED)
    for call in (store.get(KEY), store.get(KEY, at=5, size_bytes=100), store.head(KEY)):
        with pytest.raises((StoreUnavailable, BodyTruncated)):
            await call


async def test_half_of_a_body_with_headers_that_say_so(store: ObjectStore, proxy: StoreProxy) -> None:
    proxy.begin(StoreFault.SHORT)
    with pytest.raises(StoreCorrupt):
        await store.get(KEY, at=5, size_bytes=100)


async def test_one_bit_is_another(store: ObjectStore, proxy: StoreProxy) -> None:
    proxy.begin(StoreFault.FLIPPED, seed=4)
    for at, size_bytes in ((0, len(BODY)), (7, 100)):
        found = await store.get(KEY, at=at, size_bytes=size_bytes)
        wrong = [one ^ other for one, other in zip(found, BODY[at : at + size_bytes], strict=True) if one != other]
        assert len(wrong) == 1 and wrong[0].bit_count() == 1
    assert await keys(store) == [KEY], "a listing has no bits to flip"
    proxy.heal()
    assert await store.get(KEY) == BODY


async def test_ranges_are_ignored(store: ObjectStore, proxy: StoreProxy) -> None:
    proxy.begin(StoreFault.WHOLE)
    with pytest.raises(StoreCorrupt):
        await store.get(KEY, at=5, size_bytes=100)
    assert await store.get(KEY) == BODY


async def test_a_body_trickles(store: ObjectStore, proxy: StoreProxy) -> None:
    proxy.begin(StoreFault.TRICKLE, seconds=0.2)
    started = asyncio.get_running_loop().time()
    assert await store.get(KEY) == BODY
    assert asyncio.get_running_loop().time() - started >= 0.2


async def test_a_listing_is_an_old_one(store: ObjectStore, direct: ObjectStore, proxy: StoreProxy) -> None:
    assert await keys(store) == [KEY]
    await store.put("data/b", [b"x"])
    await store.delete([KEY])
    proxy.begin(StoreFault.STALE)
    assert await keys(store) == [KEY], "neither what came nor what went"
    with pytest.raises(ObjectMissing):
        await store.get(KEY)
    proxy.heal()
    assert await keys(store) == ["data/b"]


async def test_a_part_of_the_requests_is_hit(store: ObjectStore, proxy: StoreProxy) -> None:
    proxy.begin(StoreFault.ERROR, share=0.5, seed=9)
    outcomes = await asyncio.gather(*(store.head(KEY) for _ in range(100)), return_exceptions=True)
    failed = sum(isinstance(outcome, StoreUnavailable) for outcome in outcomes)
    assert 20 < failed < 80 and proxy.touched[StoreFault.ERROR] == failed


async def test_a_store_that_is_away_is_away(s3: servers.Server, store: ObjectStore) -> None:
    s3.stop()
    try:
        with pytest.raises(StoreUnavailable):
            await store.get(KEY)
    finally:
        s3.start()
    assert await store.get(KEY) == BODY


@pytest.mark.parametrize(("minutes", "is_refused"), [(16, True), (-16, True), (14, False), (-14, False)])
async def test_a_clock_that_is_too_far_off_is_refused(
    store: ObjectStore, proxy: StoreProxy, minutes: int, is_refused: bool
) -> None:
    signed = (datetime.now(UTC) + timedelta(minutes=minutes)).strftime("%Y%m%dT%H%M%SZ")
    host, _, port = proxy.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"GET /{servers.BUCKET}/{KEY} HTTP/1.1\r\nHost: {host}\r\nX-Amz-Date: {signed}\r\n\r\n".encode())
    writer.write_eof()
    assert (b"<Code>RequestTimeTooSkewed" in await reader.read()) is is_refused
    writer.close()


# ---- the nemeses


@pytest.fixture
async def fleet(tmp_path: Path, s3: servers.Server, proxy: StoreProxy) -> AsyncIterator[Fleet]:
    """No processes: the store, and one link to it."""
    made = Fleet(tmp_path, Recorder(tmp_path / "history.jsonl"))
    made.servers["s3"], made.store = s3, proxy
    made.links["query-1>s3"] = FaultProxy("query-1>s3", proxy.address)
    await made.links["query-1>s3"].start()
    yield made
    await made.links["query-1>s3"].stop()
    made.recorder.close()


async def call_everything(store: ObjectStore, number: int) -> list[BaseException]:
    """Calls of each kind; what they failed with."""
    calls = [
        store.put(f"data/{number}", [b"x"]),
        store.get(KEY),
        store.get(KEY, at=5, size_bytes=100),
        store.head(KEY),
        keys(store),
    ]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    return [outcome for outcome in outcomes if isinstance(outcome, BaseException)]


@pytest.mark.parametrize("name", sorted(nemeses.store.FAULTS))
async def test_a_nemesis_of_the_store_hits_requests_while_it_is_at_work(
    fleet: Fleet, store: ObjectStore, proxy: StoreProxy, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nemeses.store, "LATE_S", (0.1, 0.3))
    rng = random.Random(name)
    await keys(store)
    met: set[StoreFault] = set()
    for turn in nemeses.store.FAULTS[name]:
        before = proxy.touched.copy()
        async with nemeses.NEMESES[name](fleet, rng) as deed:
            for number in range(8):
                await call_everything(store, 100 * len(met) + number)
            (fault,) = proxy.touched - before
            met.add(fault)
            assert fault.value in deed.text, turn
        hit = (proxy.touched - before)[fault]
        assert deed.effect == f"{hit} requests hit" and hit > 0
        assert await call_everything(store, 100 * len(met) + 99) == []
        assert proxy.touched - before == {fault: hit}
    assert met == set(nemeses.store.FAULTS[name])


async def test_a_slow_store_is_slow_by_the_network(fleet: Fleet) -> None:
    link = fleet.links["query-1>s3"]
    async with nemeses.NEMESES["s3-slow"](fleet, random.Random(1)):
        assert 500 <= link.delay_ms[Direction.DOWN] < 5000
    assert link.delay_ms[Direction.DOWN] == 0


async def test_a_store_that_is_away_keeps_its_objects(fleet: Fleet, store: ObjectStore) -> None:
    async with nemeses.NEMESES["s3-away"](fleet, random.Random(1)):
        assert len(await call_everything(store, 1)) == 5
    assert await call_everything(store, 1) == []
    assert await store.get(KEY) == BODY
