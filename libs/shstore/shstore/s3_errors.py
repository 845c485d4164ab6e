"""Translates errors of botocore and aiohttp into the port's. The only place that knows S3's error codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import aiohttp
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ValidationError,
)

from shstore.errors import (
    BucketMissing,
    KeysRefused,
    ObjectExists,
    ObjectMissing,
    RangeBeyondEnd,
    StoreDenied,
    StoreError,
    StoreInvalid,
    StoreUnavailable,
)
from shstore.options import StoreOptions

CLIENT_ERRORS = (BotoCoreError, ClientError, aiohttp.ClientError, OSError)
"""What a call to the client may raise, beside TimeoutError."""

_THROTTLED = ("SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests", "429")
_AGAIN = ("RequestTimeout", "ConditionalRequestConflict", "OperationAborted", "BadDigest", "IncompleteBody")
_PASSING = (*_THROTTLED, *_AGAIN, "InternalError", "ServiceUnavailable")
# The same codes for a key of a DeleteObjects reply, which has no HTTP status; other stores spell them so.
_PASSING_FOR_KEY = (*_PASSING, "500", "503", "InternalServerError", "Timeout")
_MISSING = ("NoSuchKey", "NoSuchUpload")
_DENIED = ("ExpiredToken", "InvalidToken")
_NO_CREDENTIALS = (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError)


def store_error(exc: Exception, operation: str, key: str | None, settings: StoreOptions) -> StoreError:
    """Returns the StoreError for `exc`, met in `operation` on `key` (None: on the bucket)."""
    where = f"S3 {operation} at {settings.endpoint or 'AWS'}, bucket {settings.bucket!r}"
    if isinstance(exc, ClientError):
        return _response_error(exc, where, key, settings)
    if isinstance(exc, _NO_CREDENTIALS):
        return StoreDenied(
            f"{where}: {exc}; set STREAMHOUSE_S3_ACCESS_KEY and STREAMHOUSE_S3_SECRET_KEY, or boto's usual sources; or "
            "STREAMHOUSE_STORE_DIR, for a directory in place of S3"
        )
    if isinstance(exc, ParamValidationError | ValidationError):
        return StoreInvalid(f"{where}: {exc}")
    return StoreUnavailable(f"{where}: {exc or type(exc).__name__}")


def delete_errors(replied: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the errors of a DeleteObjects reply that mean that a key still exists."""
    return [error for error in replied if error.get("Code", "") not in _MISSING]


def delete_error(errors: Sequence[dict[str, Any]], keys: Sequence[str], settings: StoreOptions) -> StoreError:
    """Returns the error for `keys` that DeleteObjects reports as not deleted: a refusal if any of them is refused.

    An unknown code counts as a refusal: a call that is repeated in vain holds up the deletion of all other keys.
    """
    refused = [error for error in errors if error.get("Code", "") not in _PASSING_FOR_KEY]
    first = (refused or errors)[0]
    message = (
        f"S3 delete_objects in bucket {settings.bucket!r}: {len(errors)} keys were not deleted, "
        f"the first {first.get('Key')!r}: {first.get('Code')}: {first.get('Message', '')}"
    )
    if refused:
        return KeysRefused(message, keys)
    return StoreUnavailable(message, throttled=first.get("Code") in _THROTTLED)


def _response_error(exc: ClientError, where: str, key: str | None, settings: StoreOptions) -> StoreError:
    error = exc.response.get("Error", {})
    code = str(error.get("Code", ""))
    status = int(exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    message = f"{where}: {code}: {error.get('Message', '')} (HTTP {status})"
    if code == "NoSuchBucket":
        return BucketMissing(settings.bucket, settings.endpoint)
    if key is not None and (about_key := _object_error(code, status, key)):
        return about_key
    if code in _THROTTLED or status in (429, 503):
        return StoreUnavailable(message, throttled=code in _THROTTLED or status == 429)
    if code in _AGAIN or (status >= 500 and status != 501):  # 501: the server cannot do this at all
        return StoreUnavailable(message)
    if status in (401, 403) or code in _DENIED:
        return StoreDenied(f"{message}; check access key {settings.access_key or '(from the environment)'}")
    return StoreInvalid(message)


def _object_error(code: str, status: int, key: str) -> StoreError | None:
    if code in _MISSING or (status == 404 and code == "404"):
        return ObjectMissing(key)
    if status == 412:
        return ObjectExists(key)
    if status == 416:
        # S3 does not tell the size here; the caller looks it up and raises the error with all numbers.
        return RangeBeyondEnd(key, at=0, size_bytes=None, object_size_bytes=0)
    return None
