"""What only the S3 adapter does: bad credentials, missing buckets, and servers that misbehave on the wire."""

from __future__ import annotations

import asyncio
import dataclasses
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aioboto3
import pytest
from shstore import (
    BodyTruncated,
    BucketMissing,
    KeysRefused,
    ObjectExists,
    ObjectMissing,
    StoreCorrupt,
    StoreDenied,
    StoreError,
    StoreInvalid,
    StoreOptions,
    StoreUnavailable,
)
from shstore.s3 import S3Store

from libs.shstore.tests.http_server import answering, forwarding, listening, server

MIB = 1024 * 1024


@pytest.mark.long
async def test_no_bucket(s3_settings: StoreOptions) -> None:
    store = S3Store(dataclasses.replace(s3_settings, bucket="not-there"))
    message = f"bucket 'not-there' does not exist at {s3_settings.endpoint}"
    for call in (store.check(), store.get("k"), store.put("k", [b"x"]), store.put("k", [bytes(6 * MIB)])):
        with pytest.raises(BucketMissing, match=message):
            await call
    await store.close()


@pytest.mark.long
async def test_wrong_credentials(strict_s3: StoreOptions) -> None:
    async with opened(strict_s3) as store:
        with pytest.raises(StoreDenied, match=r"InvalidAccessKeyId.*check access key AKIAWRONG"):
            await store.check()
        with pytest.raises(StoreDenied):
            await store.put("k", [b"x"])


async def test_no_credentials(s3_settings: StoreOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    store = S3Store(dataclasses.replace(s3_settings, access_key=None, secret_key=None))
    with pytest.raises(
        StoreDenied, match=r"set STREAMHOUSE_S3_ACCESS_KEY and STREAMHOUSE_S3_SECRET_KEY, .* STREAMHOUSE_STORE_DIR"
    ):
        await store.check()
    await store.close()


async def test_nothing_listens(s3_settings: StoreOptions) -> None:
    async with server(answering(b"")) as endpoint:
        pass
    store = S3Store(dataclasses.replace(s3_settings, endpoint=endpoint))
    with pytest.raises(StoreUnavailable, match="Could not connect"):
        await store.check()
    await store.close()


async def test_keys_lie_below_the_prefix(s3_settings: StoreOptions) -> None:
    one, two = (S3Store(dataclasses.replace(s3_settings, prefix=prefix)) for prefix in ("one", "one-two"))
    await one.put("k", [b"1"])
    await two.put("k", [b"2"])
    assert await one.get("k") == b"1"
    assert [info.key async for info in one.list("")] == ["k"]
    whole = S3Store(dataclasses.replace(s3_settings, prefix=""))
    assert [info.key async for info in whole.list("")] == ["one-two/k", "one/k"]
    for store in (one, two, whole):
        await store.close()


@pytest.mark.long
@pytest.mark.parametrize("threshold_bytes", [5 * MIB, 64 * MIB], ids=["multipart", "one put"])
async def test_an_upload_holds_no_second_copy_of_the_object(s3_settings: StoreOptions, threshold_bytes: int) -> None:
    """G7: whoever builds objects counts their bytes once. The object here is 32 views of the same MiB."""
    piece = bytes(range(256)) * 4096
    async with opened(s3_settings, multipart_threshold_bytes=threshold_bytes) as store:
        await store.put("first", [b"opens the client"])
        tracemalloc.start()
        try:
            await store.put("large", [piece] * 32)
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak_bytes < 8 * MIB
        assert await store.get("large", at=5 * MIB - 2, size_bytes=4) == piece[-2:] + piece[:2]


async def uploads_under_way(settings: StoreOptions) -> int:
    client = aioboto3.Session().client(
        "s3",
        endpoint_url=settings.endpoint,
        region_name=settings.region,
        aws_access_key_id=settings.access_key,
        aws_secret_access_key=settings.secret_key,
    )
    async with client as s3:
        return len((await s3.list_multipart_uploads(Bucket=settings.bucket)).get("Uploads", []))


@pytest.mark.long
async def test_a_multipart_upload_that_loses_the_race_is_aborted(s3_settings: StoreOptions) -> None:
    store = S3Store(s3_settings)
    await store.put("large", [bytes(6 * MIB)])
    with pytest.raises(ObjectExists):
        await store.put("large", [bytes(6 * MIB)])
    assert await uploads_under_way(s3_settings) == 0
    await store.close()


@pytest.mark.long
async def test_a_failed_or_cancelled_multipart_upload_is_aborted(s3_settings: StoreOptions) -> None:
    """A proxy in between cuts (or holds back) the second part; all else passes."""
    assert s3_settings.endpoint
    for hold in (False, True):
        held = asyncio.Event()

        async def second_part(held: asyncio.Event = held, hold: bool = hold) -> None:
            held.set()
            if hold:
                await asyncio.sleep(3600)

        async with server(forwarding(s3_settings.endpoint, b"partNumber=2", second_part)) as endpoint:
            store = S3Store(dataclasses.replace(s3_settings, endpoint=endpoint))
            put = asyncio.create_task(store.put("large", [bytes(11 * MIB)]))
            await held.wait()
            if hold:
                put.cancel()
            with pytest.raises(asyncio.CancelledError if hold else StoreUnavailable):
                await put
            assert await uploads_under_way(s3_settings) == 0
            with pytest.raises(ObjectMissing):
                await store.head("large")
            await store.close()


@asynccontextmanager
async def opened(settings: StoreOptions, **changes: Any) -> AsyncIterator[S3Store]:
    store = S3Store(dataclasses.replace(settings, **changes))
    try:
        yield store
    finally:
        await store.close()


def xml_error(status: str, code: str) -> bytes:
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>said so</Message></Error>'.encode()
    return b"HTTP/1.1 %s\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n\r\n%s" % (
        status.encode(), len(body), body,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("status", "code", "kind", "throttled"),
    [
        ("503 Slow Down", "SlowDown", StoreUnavailable, True),
        ("429 Too Many", "TooManyRequests", StoreUnavailable, True),
        ("503 Unavailable", "ServiceUnavailable", StoreUnavailable, False),
        ("500 Oops", "InternalError", StoreUnavailable, False),
        ("400 Bad Request", "RequestTimeout", StoreUnavailable, False),
        ("409 Conflict", "ConditionalRequestConflict", StoreUnavailable, False),
        ("412 Precondition Failed", "PreconditionFailed", ObjectExists, None),
        ("404 Not Found", "NoSuchKey", ObjectMissing, None),
        ("404 Not Found", "NoSuchBucket", BucketMissing, None),
        ("403 Forbidden", "AccessDenied", StoreDenied, None),
        ("403 Forbidden", "SignatureDoesNotMatch", StoreDenied, None),
        ("400 Bad Request", "ExpiredToken", StoreDenied, None),
        ("400 Bad Request", "InvalidArgument", StoreInvalid, None),
        ("501 Not Implemented", "NotImplemented", StoreInvalid, None),
    ],
)
async def test_what_error_codes_mean(
    s3_settings: StoreOptions, status: str, code: str, kind: type[StoreError], throttled: bool | None
) -> None:
    requests = 0

    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        requests += 1
        writer.write(xml_error(status, code))

    async with server(answer) as endpoint:
        async with opened(s3_settings, endpoint=endpoint) as store:
            with pytest.raises(kind) as caught:
                await store.put("k", [b"x"])
        assert type(caught.value) is kind
        assert getattr(caught.value, "throttled", None) == throttled
        assert requests == 1, "retries are RetryingStore's"


DELETE_REPLY = b"""<?xml version="1.0"?><DeleteResult>%s</DeleteResult>"""
DELETE_ERROR = b"<Error><Key>%s</Key><Code>%s</Code><Message>no</Message></Error>"


@pytest.mark.parametrize(
    ("codes", "kind", "named"),
    [
        (["SlowDown"], StoreUnavailable, "k0"),
        (["InternalError", "InternalError"], StoreUnavailable, "k0"),
        (["503", "Timeout"], StoreUnavailable, "k0"),
        (["AccessDenied"], KeysRefused, "k0"),
        (["InternalError", "ObjectLocked"], KeysRefused, "k1"),
        (["NoSuchKey", "InternalServerError"], StoreUnavailable, "k1"),
        (["SomethingNew"], KeysRefused, "k0"),
    ],
)
async def test_what_codes_of_single_keys_of_a_delete_mean(
    s3_settings: StoreOptions, codes: list[str], kind: type[StoreError], named: str
) -> None:
    """A key under a lock is no store that is away: repeating does not help, and the others are gone."""
    async with server(answering(deleted_but(*codes))) as endpoint, opened(s3_settings, endpoint=endpoint) as store:
        with pytest.raises(kind, match=f"the first '{named}'") as caught:
            await store.delete(["k0", "k1"])
        assert type(caught.value) is kind


def deleted_but(*codes: str, prefix: str = "") -> bytes:
    keys = [f"{prefix}k{number}" for number in range(len(codes))]
    errors = b"".join(DELETE_ERROR % (key.encode(), code.encode()) for key, code in zip(keys, codes, strict=True))
    body = DELETE_REPLY % errors
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


async def test_a_refusal_names_the_keys_that_are_still_there(s3_settings: StoreOptions) -> None:
    reply = deleted_but("NoSuchKey", "AccessDenied", "InternalError", prefix="ours/")
    async with server(answering(reply)) as endpoint, opened(s3_settings, prefix="ours", endpoint=endpoint) as store:
        with pytest.raises(KeysRefused) as caught:
            await store.delete(["k0", "k1", "k2", "k3"])
    assert caught.value.keys == ("k1", "k2")


async def test_a_key_that_is_gone_already_is_deleted(s3_settings: StoreOptions) -> None:
    """Some stores report it as an error; its deletion would never have been finished."""
    reply = deleted_but("NoSuchKey")
    async with server(answering(reply)) as endpoint, opened(s3_settings, endpoint=endpoint) as store:
        await store.delete(["k0"])


async def test_what_others_keep_under_names_that_are_no_keys_is_not_listed(s3_settings: StoreOptions) -> None:
    """Consoles make "data/" for an empty folder; a sweep that was told of it could never delete it, nor go on."""
    async with opened(s3_settings) as store:
        await store.put("data/x", [b"ours"])
        client = await store._s3.client()
        for name in ("data/", "data//y", "data/../z"):
            await client.put_object(Bucket=s3_settings.bucket, Key=store._name(name), Body=b"theirs")
        assert [info.key async for info in store.list("data/")] == ["data/x"]


GET_100 = b'HTTP/1.1 206 Partial\r\nETag: "e"\r\nContent-Length: %d\r\nContent-Range: %s\r\n\r\n'


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (GET_100 % (10, b"bytes 5-14/100") + b"only5", StoreUnavailable),
        (GET_100 % (10, b"bytes 0-9/100") + b"0123456789", StoreCorrupt),
        (GET_100 % (10, b"nonsense") + b"0123456789", StoreCorrupt),
        (GET_100 % (7, b"bytes 5-11/100") + b"0123456", StoreCorrupt),
        (b"HTTP/1.1 200 OK\r\nETag: \"e\"\r\nContent-Length: 10\r\n\r\n0123456789", StoreCorrupt),
        (b"HTTP/1.1 200 OK\r\n\r\n", StoreCorrupt),
        (b"nothing like HTTP\r\n\r\n", StoreUnavailable),
        (b"", StoreUnavailable),
    ],
)  # fmt: skip
async def test_a_get_that_is_not_what_was_asked_for_is_an_error(
    s3_settings: StoreOptions, reply: bytes, kind: type[StoreError]
) -> None:
    async with server(answering(reply)) as endpoint, opened(s3_settings, endpoint=endpoint) as store:
        with pytest.raises((kind, BodyTruncated)):
            await store.get("k", at=5, size_bytes=10)


@pytest.mark.parametrize(
    ("limits", "message"),
    [({"read_timeout_ms": 100}, "Read timeout"), ({"attempt_timeout_ms": 100}, "took longer than 100 ms")],
)
async def test_a_silent_server_times_out(s3_settings: StoreOptions, limits: dict[str, int], message: str) -> None:
    async def silence(request: bytes, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(3600)

    async with server(silence) as endpoint, opened(s3_settings, endpoint=endpoint, **limits) as store:
        with pytest.raises(StoreUnavailable, match=message):
            await store.get("k")


@pytest.mark.parametrize("size_bytes", [10, 4 * MIB, 6 * MIB])
async def test_a_put_waits_for_nothing_but_the_reply(s3_settings: StoreOptions, size_bytes: int) -> None:
    """The server takes what comes and never says a word, not even that the body may follow."""

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(MIB):
            pass

    async with (
        listening(listen) as endpoint,
        opened(s3_settings, endpoint=endpoint, read_timeout_ms=100) as store,
    ):
        with pytest.raises(StoreUnavailable, match="Read timeout"):
            await store.put("k", [bytes(size_bytes)])


async def test_a_huge_object_is_refused_before_it_is_read(s3_settings: StoreOptions) -> None:
    reply = b'HTTP/1.1 200 OK\r\nETag: "e"\r\nContent-Length: 99999999999999\r\n\r\n'
    message = "get of 99999999999999 bytes of 'k' is over get_bytes_max = 1000"
    async with (
        server(answering(reply)) as endpoint,
        opened(s3_settings, endpoint=endpoint, get_bytes_max=1000) as store,
    ):
        with pytest.raises(StoreInvalid, match=message):
            await store.get("k")
