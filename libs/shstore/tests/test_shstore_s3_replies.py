"""Requests that took effect at a real S3 server and whose replies never came, or came in part."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from shstore import (
    BodyTruncated,
    ObjectExists,
    ObjectMissing,
    RetryingStore,
    RetryPolicy,
    StoreOptions,
    StoreUnavailable,
)
from shstore.s3 import S3Store

from libs.shstore.tests.http_server import Wire, server
from libs.shstore.tests.test_shstore_s3 import uploads_under_way

pytestmark = pytest.mark.long

MIB = 1024 * 1024
LARGE = bytes(range(256)) * (6 * 4096)  # two parts
SMALL = b"mine"
POLICY = RetryPolicy(base_delay_ms=1, throttled_base_delay_ms=1)


@asynccontextmanager
async def wired(settings: StoreOptions) -> AsyncIterator[tuple[Wire, S3Store]]:
    """A store that reaches its server through the wire."""
    assert settings.endpoint
    wire = Wire(settings.endpoint)
    async with server(wire.answer) as endpoint:
        store = S3Store(dataclasses.replace(settings, endpoint=endpoint))
        try:
            yield wire, store
        finally:
            await store.close()


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize(
    ("body", "request_"),
    [
        (SMALL, b"PUT "),
        (LARGE, b"?uploads "),
        (LARGE, b"partNumber=2"),
        (LARGE, b"?uploadId="),
    ],
    ids=["put", "create", "part", "complete"],
)
async def test_a_put_whose_reply_was_lost_is_found_to_be_done(
    s3_settings: StoreOptions, body: bytes, request_: bytes, times: int
) -> None:
    async with wired(s3_settings) as (wire, one_try):
        wire.lost += [request_] * times
        store = RetryingStore(one_try, POLICY)
        put, head = await store.put("k", [body]), await store.head("k")
        assert (put.key, put.size_bytes, put.etag) == (head.key, head.size_bytes, head.etag)
        assert not wire.lost, "the fault was met"
        assert await store.get("k") == body
        assert [info.key async for info in store.list("")] == ["k"]


@pytest.mark.parametrize("checksums", [True, False])
async def test_a_multipart_upload_is_created_for_the_checksum_that_its_parts_carry(
    s3_settings: StoreOptions, checksums: bool
) -> None:
    async with wired(dataclasses.replace(s3_settings, request_checksums=checksums)) as (wire, store):
        await store.put("k", [LARGE])
    (create,) = [head for head in wire.heads if b"?uploads " in head]
    parts = [head for head in wire.heads if b"partnumber=" in head]
    assert len(parts) == 2
    assert (b"x-amz-checksum-algorithm: crc32\r\n" in create) == checksums
    assert all((b"x-amz-checksum-crc32" in part) == checksums for part in parts)


async def test_a_completed_upload_whose_reply_was_lost_leaves_no_parts(s3_settings: StoreOptions) -> None:
    async with wired(s3_settings) as (wire, one_try):
        wire.lost = [b"?uploadId="]
        await RetryingStore(one_try, POLICY).put("k", [LARGE])
        assert await uploads_under_way(s3_settings) == 0


@pytest.mark.parametrize(("body", "request_"), [(SMALL, b"PUT "), (LARGE, b"?uploadId=")], ids=["put", "complete"])
async def test_a_lost_reply_does_not_hide_that_somebody_else_has_the_key(
    s3_settings: StoreOptions, body: bytes, request_: bytes
) -> None:
    """What is lost is "it exists": the next try must not take the other's bytes for its own."""
    async with wired(s3_settings) as (wire, one_try):
        theirs = bytes(len(body))
        await one_try.put("k", [theirs])
        wire.lost = [request_]
        store = RetryingStore(one_try, POLICY)
        with pytest.raises(ObjectExists):
            await store.put("k", [body])
        assert not wire.lost
        assert await store.get("k") == theirs


@pytest.mark.smoke
async def test_one_attempt_is_one_request(s3_settings: StoreOptions) -> None:
    """Whoever repeats a put must know that it is a repetition: its own object is in the way then."""
    async with wired(s3_settings) as (wire, store):
        wire.lost = [b"PUT "]
        with pytest.raises(StoreUnavailable):
            await store.put("k", [SMALL])
        assert wire.count(b"PUT ") == 1
        assert await store.get("k") == SMALL


async def test_a_delete_whose_reply_was_lost_is_repeated(s3_settings: StoreOptions) -> None:
    async with wired(s3_settings) as (wire, one_try):
        store = RetryingStore(one_try, POLICY)
        for key in ("a", "b", "kept"):
            await store.put(key, [SMALL])
        wire.lost = [b"?delete"] * 2
        await store.delete(["a", "b"])
        assert not wire.lost
        assert [info.key async for info in store.list("")] == ["kept"]
        with pytest.raises(ObjectMissing):
            await store.get("a")


@pytest.mark.parametrize(("at", "size_bytes"), [(0, None), (100, None), (0, MIB), (MIB, 4 * MIB)])
async def test_a_body_that_breaks_off_is_never_taken_for_the_whole(
    s3_settings: StoreOptions, at: int, size_bytes: int | None
) -> None:
    wanted = LARGE[at:] if size_bytes is None else LARGE[at : at + size_bytes]
    async with wired(s3_settings) as (wire, one_try):
        await one_try.put("k", [LARGE])
        wire.cut = [b"GET "]
        with pytest.raises((StoreUnavailable, BodyTruncated)) as caught:
            await one_try.get("k", at=at, size_bytes=size_bytes)
        assert caught.value.retriable
        wire.cut = [b"GET "] * 2
        assert await RetryingStore(one_try, POLICY).get("k", at=at, size_bytes=size_bytes) == wanted
        assert not wire.cut


@pytest.mark.smoke
async def test_a_listing_that_breaks_off_is_never_taken_for_the_whole(s3_settings: StoreOptions) -> None:
    async with wired(s3_settings) as (wire, one_try):
        store = RetryingStore(one_try, POLICY)
        keys = [f"data/t/{number}" for number in range(5)]
        for key in keys:
            await store.put(key, [SMALL])
        wire.cut = [b"list-type=2"] * 2
        assert [info.key async for info in store.list("data/")] == keys
        assert not wire.cut
