"""The port's contract: every store must pass every one of these, and so must a faulty one behind retries."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from shstore import (
    FaultKind,
    FaultyStore,
    KeyInvalid,
    LocalStore,
    MemoryStore,
    ObjectExists,
    ObjectMissing,
    ObjectStore,
    RandomFaults,
    RangeBeyondEnd,
    RetryingStore,
    RetryPolicy,
    StoreInvalid,
    StoreOptions,
)
from shstore.s3 import S3Store

MIB = 1024 * 1024
STORES = (
    "memory",
    "local",
    "s3",
    pytest.param("versitygw", marks=pytest.mark.integration),
    "faulty",
)


@pytest.fixture(params=STORES)
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[ObjectStore]:
    opened: ObjectStore
    if request.param == "memory":
        opened = MemoryStore()
    elif request.param == "local":
        opened = LocalStore(StoreOptions(kind="local", path=tmp_path / "store", prefix="cluster-a"))
    elif request.param == "s3":
        opened = S3Store(request.getfixturevalue("s3_settings"))
    elif request.param == "versitygw":
        opened = S3Store(request.getfixturevalue("versitygw_settings"))
    else:
        opened = RetryingStore(
            FaultyStore(MemoryStore(), RandomFaults(random.Random(7), dict.fromkeys(FaultKind, 0.05))),
            RetryPolicy(base_delay_ms=1, throttled_base_delay_ms=1, max_delay_ms=2),
            rng=random.Random(7),
        )
    yield opened
    await opened.close()
    await opened.close()


async def keys_of(store: ObjectStore, prefix: str = "", start_after: str = "") -> list[str]:
    return [info.key async for info in store.list(prefix, start_after=start_after)]


async def put_many(store: ObjectStore, keys: list[str]) -> None:
    room = asyncio.Semaphore(16)

    async def put(key: str) -> None:
        async with room:
            await store.put(key, [b"x"])

    await asyncio.gather(*(put(key) for key in keys))


async def test_check_passes_on_a_usable_store(store: ObjectStore) -> None:
    await store.check()
    assert await keys_of(store) == []


async def test_what_was_put_is_read_back(store: ObjectStore) -> None:
    parts = [b"head", memoryview(b"..middle..")[2:8], b"", memoryview(b"tail")]
    info = await store.put("data/t/0/a.seg", parts)
    assert (info.key, info.size_bytes) == ("data/t/0/a.seg", 14)
    assert await store.get("data/t/0/a.seg") == b"headmiddletail"
    head = await store.head("data/t/0/a.seg")
    assert head.size_bytes == 14
    assert head.etag == info.etag
    assert abs(head.modified_ms - info.modified_ms) <= 1000
    assert [head] == [found async for found in store.list("")]


async def test_ranges(store: ObjectStore) -> None:
    await store.put("k", [bytes(range(100))])
    assert await store.get("k", at=10, size_bytes=5) == bytes(range(10, 15))
    assert await store.get("k", at=0, size_bytes=100) == bytes(range(100))
    assert await store.get("k", at=99, size_bytes=1) == b"\x63"
    assert await store.get("k", at=90) == bytes(range(90, 100))
    assert await store.get("k", at=100) == b""
    assert await store.get("k", at=100, size_bytes=0) == b""
    assert await store.get("k", at=5, size_bytes=0) == b""


@pytest.mark.parametrize(("at", "size_bytes"), [(0, 101), (99, 2), (100, 1), (200, 1), (101, None), (101, 0)])
async def test_a_range_beyond_the_end_is_an_error(store: ObjectStore, at: int, size_bytes: int | None) -> None:
    await store.put("k", [bytes(100)])
    with pytest.raises(RangeBeyondEnd) as caught:
        await store.get("k", at=at, size_bytes=size_bytes)
    assert (caught.value.at, caught.value.size_bytes, caught.value.object_size_bytes) == (at, size_bytes, 100)


async def test_a_negative_range_is_refused(store: ObjectStore) -> None:
    await store.put("k", [b"x"])
    with pytest.raises(StoreInvalid, match="at is -1"):
        await store.get("k", at=-1)
    with pytest.raises(StoreInvalid, match="size_bytes is -2"):
        await store.get("k", size_bytes=-2)


@pytest.mark.parametrize("parts", [[], [b""], [b"", memoryview(b"")]])
async def test_zero_size(store: ObjectStore, parts: list[bytes | memoryview]) -> None:
    assert (await store.put("empty", parts)).size_bytes == 0
    assert (await store.head("empty")).size_bytes == 0
    assert await store.get("empty") == b""
    assert await store.get("empty", at=0, size_bytes=0) == b""
    with pytest.raises(RangeBeyondEnd):
        await store.get("empty", at=0, size_bytes=1)


async def test_put_if_absent_keeps_the_first(store: ObjectStore) -> None:
    await store.put("k", [b"first"])
    with pytest.raises(ObjectExists):
        await store.put("k", [b"second"])
    assert await store.get("k") == b"first"


async def test_put_may_replace(store: ObjectStore) -> None:
    first = await store.put("k", [b"first"])
    second = await store.put("k", [b"longer than first"], if_absent=False)
    assert await store.get("k") == b"longer than first"
    assert second.etag != first.etag
    await store.put("new", [b"n"], if_absent=False)
    assert await keys_of(store) == ["k", "new"]


@pytest.mark.parametrize("round_", range(5))
async def test_one_of_many_racing_puts_wins(store: ObjectStore, round_: int) -> None:
    bodies = [f"writer {number}".encode() * 1000 for number in range(8)]
    results = await asyncio.gather(*(store.put("race", [body]) for body in bodies), return_exceptions=True)
    won = [index for index, result in enumerate(results) if not isinstance(result, BaseException)]
    assert len(won) == 1
    lost = [result for result in results if isinstance(result, BaseException)]
    assert all(isinstance(result, ObjectExists) for result in lost)
    assert await store.get("race") == bodies[won[0]]


async def test_large_objects_go_through(store: ObjectStore) -> None:
    rng = random.Random(3)
    body = rng.randbytes(11 * MIB + 17)
    parts = [memoryview(body)[: 3 * MIB], memoryview(body)[3 * MIB : 3 * MIB + 5], body[3 * MIB + 5 :]]
    info = await store.put("large", parts)
    assert info.size_bytes == len(body)
    assert await store.get("large") == body
    assert await store.get("large", at=5 * MIB - 3, size_bytes=10) == body[5 * MIB - 3 : 5 * MIB + 7]
    with pytest.raises(ObjectExists):
        await store.put("large", [bytes(len(body))])
    assert await store.get("large", size_bytes=100) == body[:100]


async def test_missing_objects(store: ObjectStore) -> None:
    for call in (store.get("gone"), store.get("gone", at=3, size_bytes=4), store.get("gone", size_bytes=0)):
        with pytest.raises(ObjectMissing, match="gone"):
            await call
    with pytest.raises(ObjectMissing):
        await store.head("gone")
    await store.put("dir/inside", [b"x"])
    with pytest.raises(ObjectMissing):
        await store.get("dir")
    with pytest.raises(ObjectMissing):
        await store.head("dir/inside/deeper")


async def test_delete(store: ObjectStore) -> None:
    await put_many(store, ["a/1", "a/2", "b"])
    await store.delete(["a/1", "never/was", "b", "a"])
    assert await keys_of(store) == ["a/2"]
    await store.delete([])
    await store.delete(["a/1"])
    await store.put("a/1", [b"again"])
    assert await keys_of(store) == ["a/1", "a/2"]


async def test_list_is_in_key_order(store: ObjectStore) -> None:
    keys = ["a-b", "a.", "a/b", "a/b-c/d", "a/b.d", "a0", "a1/x", "B", "b/1", "b/10", "b/2", "é/ü", "\U0001f600"]
    await put_many(store, keys[::-1])
    assert await keys_of(store) == sorted(keys)
    for start_after in ("", "a", "a-", "a/", "a/b", "a/b-c/d", "a/zzz", "b/1", "zz", "\U0001f600"):
        assert await keys_of(store, start_after=start_after) == sorted(k for k in keys if k > start_after)


async def test_list_by_prefix(store: ObjectStore) -> None:
    keys = ["data/orders/0/a", "data/orders/1/b", "data/orders-1/0/c", "data2/x", "dat"]
    await put_many(store, keys)
    assert await keys_of(store, "data/orders/") == keys[:2]
    assert await keys_of(store, "data/orders") == ["data/orders-1/0/c", *keys[:2]]
    assert await keys_of(store, "data/orders/1/b") == ["data/orders/1/b"]
    assert await keys_of(store, "data/orders", "data/orders/0/a") == ["data/orders/1/b"]
    assert await keys_of(store, "dat", "data/p") == ["data2/x"]
    assert await keys_of(store, "none/") == []
    assert await keys_of(store, "dat/") == []


@pytest.mark.long
async def test_list_goes_over_pages(store: ObjectStore) -> None:
    keys = [f"p/{number // 500}/{number:05}" for number in range(1050)]
    await put_many(store, random.Random(1).sample(keys, len(keys)))
    assert await keys_of(store, "p/") == keys
    assert await keys_of(store, "p/", keys[34]) == keys[35:]
    await store.delete(keys[:1020])
    assert await keys_of(store) == keys[1020:]


@pytest.mark.parametrize(
    "key",
    ["a b", "100%", "a+b", "q?x=1&y=2", "#h", "back\\slash", "'\"<>&;", "ünï/cødé", "...", "..a/b..", "~", "%2e%2e/x",
     "a:b@c", "*", "[x]", "c" * 255, "/".join(["d" * 99] * 7)],
)  # fmt: skip
async def test_odd_keys_survive(store: ObjectStore, key: str) -> None:
    await store.put(key, [key.encode()])
    assert await store.get(key) == key.encode()
    assert await store.get(key, at=1) == key.encode()[1:]
    assert (await store.head(key)).key == key
    assert await keys_of(store, key) == [key]
    await store.delete([key])
    assert await keys_of(store) == []


@pytest.mark.parametrize(
    "key",
    ["", "..", ".", "../etc/passwd", "a/../b", "a/..", "a/./b", "/etc/passwd", "a//b", "a/", "/", "nul\0", "new\nline",
     "\x7f", "\ud800", "\uffff", "x" * 256, "y/" * 450 + "z"],
)  # fmt: skip
async def test_bad_keys_are_refused_by_every_call(store: ObjectStore, key: str) -> None:
    with pytest.raises(KeyInvalid):
        await store.put(key, [b"x"])
    with pytest.raises(KeyInvalid):
        await store.get(key)
    with pytest.raises(KeyInvalid):
        await store.head(key)
    with pytest.raises(KeyInvalid):
        await store.delete(["fine", key])


@pytest.mark.parametrize("prefix", ["..", "../", "a/../", "/", "a//", "./x"])
async def test_bad_prefixes_are_refused(store: ObjectStore, prefix: str) -> None:
    with pytest.raises(KeyInvalid):
        await keys_of(store, prefix)
