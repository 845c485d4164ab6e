"""Any S3 API as object store, over aioboto3. One HTTP attempt per request: RetryingStore repeats, not boto.

Knows nothing of the objects' contents. Requests and their errors: `s3_requests`, `s3_errors`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from email.utils import parsedate_to_datetime

from shstore.body import request_body
from shstore.errors import BodyTruncated, ObjectMissing, RangeBeyondEnd, StoreError, WrongRange
from shstore.keys import check_key, check_prefix, is_key
from shstore.options import S3_PARTS_MAX, StoreOptions
from shstore.port import ObjectInfo
from shstore.ranges import byte_views, check_range, resolve_range, split_views
from shstore.s3_errors import delete_error, delete_errors
from shstore.s3_requests import Reply, S3Requests

_log = logging.getLogger(__name__)

DELETE_KEYS_MAX = 1000
"""Most keys of one DeleteObjects request (S3's limit)."""

ABORT_TIMEOUT_S = 5.0
"""Longest an abort may hold up the error it follows, or a shutdown; a bucket lifecycle rule removes the rest."""


class S3Store:
    """Objects in `settings.bucket` below `settings.prefix`. The client opens at the first call."""

    def __init__(self, settings: StoreOptions) -> None:
        assert settings.kind == "s3"
        self._settings = settings
        self._prefix = f"{settings.prefix.rstrip('/')}/" if settings.prefix else ""
        self._s3 = S3Requests(settings)
        # CreateMultipartUpload names the checksum that the parts carry: servers may refuse parts with a checksum that
        # the upload was not created for, as S3's own description of multipart uploads says. Both calls name it, so that
        # the two cannot differ by a default of the client library.
        self._checksum = {"ChecksumAlgorithm": "CRC32"} if settings.request_checksums else {}

    async def put(self, key: str, parts: Sequence[bytes | memoryview], *, if_absent: bool = True) -> ObjectInfo:
        check_key(key)
        views, size_bytes = byte_views(parts)
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        if size_bytes > self._settings.multipart_threshold_bytes:
            reply = await self._put_multipart(key, views, size_bytes, condition)
        else:
            reply = await self._s3.request(
                "put_object", key, Key=self._name(key), Body=request_body(views), **condition
            )
        # The reply to a put has no Last-Modified; its Date is by the store's clock, too, not by ours.
        sent_at = reply["ResponseMetadata"]["HTTPHeaders"].get("date")
        if sent_at is None:
            return await self.head(key)
        return _info(key, size_bytes, parsedate_to_datetime(sent_at), reply)

    async def get(self, key: str, *, at: int = 0, size_bytes: int | None = None) -> bytes:
        check_key(key)
        check_range(at, size_bytes)
        if size_bytes == 0:
            return await self._get_empty(key, at, size_bytes)  # an HTTP range cannot express an empty range
        try:
            return await self._s3.attempt("get_object", key, self._read(key, at, size_bytes))
        # S3 refuses a range that begins at the end of the object, which is an empty range here.
        except RangeBeyondEnd:
            return await self._get_empty(key, at, size_bytes)

    async def head(self, key: str) -> ObjectInfo:
        check_key(key)
        reply = await self._s3.request("head_object", key, Key=self._name(key))
        return _info(key, reply["ContentLength"], reply["LastModified"], reply)

    async def list(self, prefix: str, *, start_after: str = "") -> AsyncIterator[ObjectInfo]:
        check_prefix(prefix)
        position = {"StartAfter": self._name(start_after)} if start_after else {}
        while True:
            page = await self._s3.request("list_objects_v2", None, Prefix=self._name(prefix), **position)
            for found in page.get("Contents", ()):
                key = found["Key"].removeprefix(self._prefix)
                if is_key(key):  # consoles make such names for empty folders, as "data/"
                    yield _info(key, found["Size"], found["LastModified"], found)
            if not page.get("IsTruncated"):
                return
            position = {"ContinuationToken": page["NextContinuationToken"]}

    async def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            check_key(key)
        errors: list[Reply] = []
        for start in range(0, len(keys), DELETE_KEYS_MAX):
            names = [{"Key": self._name(key)} for key in keys[start : start + DELETE_KEYS_MAX]]
            reply = await self._s3.request("delete_objects", None, Delete={"Objects": names, "Quiet": True})
            # S3 answers 200 also if it deleted nothing: the body has the error of each key.
            errors += delete_errors(reply.get("Errors", ()))
        if errors:
            kept = [str(error.get("Key", "")).removeprefix(self._prefix) for error in errors]
            raise delete_error(errors, kept, self._settings)

    async def check(self) -> None:
        # A list, not HeadBucket: its error has a body that tells a wrong key from a missing permission.
        await self._s3.request("list_objects_v2", None, Prefix=self._prefix, MaxKeys=1)

    async def close(self) -> None:
        await self._s3.close()

    def _name(self, key: str) -> str:
        return self._prefix + key

    async def _read(self, key: str, at: int, size_bytes: int | None) -> bytes:
        """Sends a GET and returns its body. Every number that the reply declares is checked before its body is read."""
        client = await self._s3.client()
        arguments = {"Bucket": self._settings.bucket, "Key": self._name(key), **_range(at, size_bytes)}
        reply = await client.get_object(**arguments)
        async with reply["Body"] as body:
            wanted = resolve_range(
                key,
                at=at,
                size_bytes=size_bytes,
                object_size_bytes=_object_size_bytes(key, at, reply, ranged="Range" in arguments),
                get_bytes_max=self._settings.get_bytes_max,
            )
            # A server or proxy that ignores the range would send the whole object.
            if reply["ContentLength"] != wanted:
                raise WrongRange(f"S3 offers {reply['ContentLength']} bytes of {key!r}, not {wanted}")
            data: bytes = await body.read()
        if len(data) != wanted:
            raise BodyTruncated(key, expected_bytes=wanted, got_bytes=len(data))
        return data

    async def _get_empty(self, key: str, at: int, size_bytes: int | None) -> bytes:
        """Returns no bytes for a range at the end, or raises the error for a range beyond it: S3's reply does not
        tell the size."""
        info = await self.head(key)
        wanted = resolve_range(key, at=at, size_bytes=size_bytes, object_size_bytes=info.size_bytes, get_bytes_max=0)
        assert wanted == 0, "get_bytes_max is 0"
        return b""

    async def _put_multipart(self, key: str, views: Sequence[memoryview], size_bytes: int, condition: Reply) -> Reply:
        created = await self._s3.request("create_multipart_upload", key, Key=self._name(key), **self._checksum)
        upload = {"Key": self._name(key), "UploadId": created["UploadId"]}
        try:
            parts = await self._upload_parts(key, upload, views, size_bytes)
            # The condition belongs to the completion: until then no object has the key, and several writers may upload
            # parts.
            return await self._s3.request(
                "complete_multipart_upload", key, MultipartUpload={"Parts": parts}, **upload, **condition
            )
        # Also a cancellation: the parts of an upload that is neither completed nor aborted stay stored.
        except BaseException:
            await self._abort(key, upload)
            raise

    async def _upload_parts(
        self, key: str, upload: Reply, views: Sequence[memoryview], size_bytes: int
    ) -> Sequence[Reply]:
        # S3 limits the number of parts, so those of a very large object are larger.
        part_bytes = max(self._settings.multipart_part_bytes, -(-size_bytes // S3_PARTS_MAX))
        room = asyncio.Semaphore(self._settings.multipart_concurrency)

        async def send(number: int, part: Sequence[memoryview]) -> Reply:
            async with room:
                reply = await self._s3.request(
                    "upload_part", key, PartNumber=number, Body=request_body(part), **self._checksum, **upload
                )
            checksum = {"ChecksumCRC32": reply["ChecksumCRC32"]} if "ChecksumCRC32" in reply else {}
            return {"PartNumber": number, "ETag": reply["ETag"], **checksum}

        try:
            async with asyncio.TaskGroup() as group:
                numbered = enumerate(split_views(views, part_bytes), start=1)
                sent = [group.create_task(send(number, part)) for number, part in numbered]
        except* StoreError as failed:
            raise failed.exceptions[0] from failed
        return [task.result() for task in sent]

    async def _abort(self, key: str, upload: Reply) -> None:
        """Frees the parts of a failed upload. A failure here only costs space, so it is logged, not raised."""
        try:
            async with asyncio.timeout(ABORT_TIMEOUT_S):
                await self._s3.request("abort_multipart_upload", key, **upload)
        except ObjectMissing:
            _log.debug("multipart upload of %r is already gone", key)
        except (StoreError, TimeoutError) as exc:
            _log.warning("multipart upload %s of %r was not aborted: %s", upload["UploadId"], key, exc)


def _range(at: int, size_bytes: int | None) -> dict[str, str]:
    if at == 0 and size_bytes is None:
        return {}
    last = "" if size_bytes is None else at + size_bytes - 1
    return {"Range": f"bytes={at}-{last}"}


def _object_size_bytes(key: str, at: int, reply: Reply, *, ranged: bool) -> int:
    """Returns the whole object's size, from a GET's headers: `Content-Range: bytes <first>-<last>/<size>`."""
    if not ranged:
        return int(reply["ContentLength"])
    header = reply.get("ContentRange", "")
    first, _, size = header.removeprefix("bytes ").replace("-", "/", 1).partition("/")
    size = size.rpartition("/")[2]
    if not size.isdecimal() or first != str(at):
        raise WrongRange(f"S3 answered a range at byte {at} of {key!r} with Content-Range {header!r}")
    return int(size)


def _info(key: str, size_bytes: int, modified: datetime, reply: Reply) -> ObjectInfo:
    modified_ms = int(modified.timestamp() * 1000)
    etag = reply["ETag"].strip('"')
    return ObjectInfo(key=key, size_bytes=size_bytes, modified_ms=modified_ms, etag=etag)
