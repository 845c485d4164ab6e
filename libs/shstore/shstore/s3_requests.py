"""The S3 client: configuration, opening and closing, and requests with time limit and error translation."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from typing import Any, TypeAlias, TypeVar

import aioboto3
from aiobotocore.config import AioConfig
from aiobotocore.httpsession import AIOHTTPSession

from shstore.errors import StoreUnavailable
from shstore.options import StoreOptions
from shstore.s3_errors import CLIENT_ERRORS, store_error

Reply: TypeAlias = dict[str, Any]
Result = TypeVar("Result")


class S3Requests:
    """Sends requests to one bucket; opens its client at the first request."""

    def __init__(self, settings: StoreOptions) -> None:
        self._settings = settings
        self._resources = AsyncExitStack()
        self._opening = asyncio.Lock()
        self._client: Any = None

    async def client(self) -> Any:
        """Returns the client, opened by the first call."""
        # Two first requests would open two clients, and close would know one of them.
        async with self._opening:
            if self._client is None:
                self._client = await self._resources.enter_async_context(_new_client(self._settings))
            return self._client

    async def request(self, operation: str, key: str | None, **arguments: Any) -> Reply:
        """Sends an operation to the bucket and returns the reply. Raises StoreError; `key` names the object for it."""
        return await self.attempt(operation, key, self._call(operation, arguments))

    async def attempt(self, operation: str, key: str | None, call: Coroutine[Any, Any, Result]) -> Result:
        """Awaits `call` with the attempt's time limit and returns its result; translates its errors."""
        timeout_ms = self._settings.attempt_timeout_ms
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                return await call
        except TimeoutError as exc:
            raise StoreUnavailable(f"S3 {operation} took longer than {timeout_ms} ms") from exc
        except CLIENT_ERRORS as exc:
            raise store_error(exc, operation, key, self._settings) from exc

    async def close(self) -> None:
        """Closes the client; does nothing without one."""
        async with self._opening:
            self._client = None
            await self._resources.aclose()

    async def _call(self, operation: str, arguments: Reply) -> Reply:
        client = await self.client()
        reply: Reply = await getattr(client, operation)(Bucket=self._settings.bucket, **arguments)
        return reply


class _Http(AIOHTTPSession):  # type: ignore[misc]
    """HTTP session without two defaults of aiohttp."""

    async def send(self, request: Any) -> Any:
        """Sends without `Expect: 100-continue`: aiohttp waits longer than read_timeout for the server's 100."""
        request.headers.pop("Expect", None)
        return await super().send(request)

    async def _get_session(self, proxy_url: str | None) -> Any:
        """Returns a session that sends each request once.

        aiohttp repeats a PUT whose connection broke. Had the first attempt taken effect, the repetition would meet its
        own object, and the caller would be told that another writer's object exists.
        """
        session = await super()._get_session(proxy_url)
        session._retry_connection = False  # there is no public switch; aiohttp's own test client does the same
        return session


def _new_client(settings: StoreOptions) -> Any:
    config = AioConfig(
        connect_timeout=settings.connect_timeout_ms / 1000,
        read_timeout=settings.read_timeout_ms / 1000,
        max_pool_connections=settings.max_connections,
        # One attempt: retries here would multiply with those of RetryingStore.
        retries={"mode": "standard", "total_max_attempts": 1},
        http_session_cls=_Http,
        signature_version="s3v4",
        s3={"addressing_style": "path" if settings.path_style else "virtual"},
        request_checksum_calculation="when_supported" if settings.request_checksums else "when_required",
        # Every block is checked by its own CRC when it is decoded.
        response_checksum_validation="when_required",
    )
    return aioboto3.Session().client(
        "s3",
        endpoint_url=settings.endpoint,
        region_name=settings.region,
        aws_access_key_id=settings.access_key,
        aws_secret_access_key=settings.secret_key,
        config=config,
    )
