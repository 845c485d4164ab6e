"""Chunks in Redis, shared by the query services of a fleet.

Redis only saves time: trouble with Redis is a metric, never an error.
"""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import Awaitable, Callable
from typing import TypeVar

import redis.asyncio
from redis.exceptions import RedisError
from shruntime.clock import Clock

from shread.chunk_reader import ChunkId
from shread.core.breaker import CircuitBreaker
from shread.counters import Counters

log = logging.getLogger(__name__)

_CRC_BYTES = 4
T = TypeVar("T")


class RedisCache:
    """Values are a CRC32 (little-endian) and the chunk. No call takes longer than `timeout_ms`. Only services with
    the same `chunk_bytes` share: for others a chunk of that number is other bytes of the object."""

    def __init__(
        self,
        url: str,
        *,
        chunk_bytes: int,
        timeout_ms: int,
        ttl_s: int,
        breaker: CircuitBreaker,
        clock: Clock,
        counters: Counters,
    ) -> None:
        """Connects at the first use. Raises ValueError for a malformed url."""
        self._redis = redis.asyncio.Redis.from_url(url)
        self._chunk_bytes = chunk_bytes
        self._timeout_s = timeout_ms / 1000
        self._ttl_s = ttl_s
        self._breaker = breaker
        self._clock = clock
        self._counters = counters

    async def get(self, chunk: ChunkId) -> bytes | None:
        """Returns the chunk, or None if absent or damaged, or if Redis does not answer in time."""
        value = await self._call(lambda: self._redis.get(self._key_of(chunk)))
        if value is None:
            self._counters.shared_misses += 1
            return None
        assert isinstance(value, bytes), "decode_responses is off"
        content = value[_CRC_BYTES:]
        if int.from_bytes(value[:_CRC_BYTES], "little") != zlib.crc32(content):
            self._counters.shared_errors += 1
            log.warning("chunk %s in Redis is damaged and passed over", chunk)
            await self.drop(chunk)
            return None
        self._counters.shared_hits += 1
        return content

    async def put(self, chunk: ChunkId, content: bytes) -> None:
        value = zlib.crc32(content).to_bytes(_CRC_BYTES, "little") + content
        # With an expiry, since chunks of deleted objects are not removed in any other way.
        await self._call(lambda: self._redis.set(self._key_of(chunk), value, ex=self._ttl_s))

    async def drop(self, chunk: ChunkId) -> None:
        await self._call(lambda: self._redis.delete(self._key_of(chunk)))

    async def close(self) -> None:
        await self._redis.aclose()

    async def _call(self, command: Callable[[], Awaitable[T]]) -> T | None:
        if not self._breaker.allows(self._clock.monotonic_ms()):
            return None
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await command()
        except (RedisError, OSError, TimeoutError) as error:
            self._counters.shared_errors += 1
            if self._breaker.failed(self._clock.monotonic_ms()):
                log.warning("Redis does not answer, reads go on without it: %s", error or type(error).__name__)
            return None
        self._breaker.succeeded()
        return answer

    def _key_of(self, chunk: ChunkId) -> str:
        return f"streamhouse:chunk:{self._chunk_bytes}:{chunk.object_key}:{chunk.number}"
