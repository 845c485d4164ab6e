"""Settings of every service that reads records. Each has a unit, a range and a reason."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationInfo, field_validator
from shruntime.memory import MIB, MemoryShare
from shruntime.urls import url_of
from shstore.settings import StoreSettings


class ReadSettings(StoreSettings):
    """Settings of the read engine: its caches, and its waits."""

    cache_dir: Path = Field(
        Path("streamhouse-cache"), description="directory of the chunk cache, for one query service; may be deleted"
    )
    cache_bytes_max: int = Field(
        1024 * MIB,
        ge=MIB,
        le=1 << 50,
        description="bytes of chunks kept on disk; what consumers read again within minutes should fit",
    )
    cache_chunk_bytes: int = Field(
        4 * MIB,
        ge=64 * 1024,
        le=64 * MIB,
        description="bytes of one download; at 4 MiB S3's time to first byte is about half of the whole",
    )
    readahead_chunks: int = Field(
        4,
        ge=0,
        le=64,
        description="chunks fetched ahead of a sequential reader at most; 4 x 4 MiB hide 100 ms at 160 MB/s",
    )
    downloads_in_flight_max: int = Field(
        default_factory=MemoryShare(part=16, least=2, most=16, unit=4 * MIB),
        ge=1,
        le=1024,
        description="downloads at once, each one chunk of memory: 16 x 4 MiB",
    )
    segment_index_cache_entries: int = Field(
        default_factory=MemoryShare(part=32, least=10_000, most=1_000_000, unit=80),
        ge=1,
        le=100_000_000,
        description="block entries kept in memory, 80 bytes each; one per MiB of records, so this is about 1 TB of log",
    )
    redis_url: Annotated[str, AfterValidator(url_of("redis", "rediss", "unix"))] = Field(
        "", repr=False, description="Redis that query services share chunks through; empty: none"
    )
    redis_timeout_ms: int = Field(
        50, ge=1, le=10_000, description="ms to wait for Redis; beyond that the object store is about as quick"
    )
    redis_ttl_s: int = Field(600, ge=1, le=30 * 86_400, description="seconds a chunk stays in Redis without being set")
    redis_failures_max: int = Field(
        5, ge=1, le=1000, description="failures in a row after which Redis is left alone for a while"
    )
    redis_pause_ms: int = Field(5_000, ge=10, le=600_000, description="ms that Redis is left alone then")
    catch_up_ms: int = Field(
        3_000,
        ge=0,
        le=60_000,
        description="ms to wait for the event feed where an agent has dropped what is registered; it takes about 10",
    )

    @field_validator("cache_chunk_bytes")
    @classmethod
    def _chunks_fit_the_cache(cls, value: int, info: ValidationInfo) -> int:
        if value > info.data.get("cache_bytes_max", value):
            raise ValueError(f"must not be above cache_bytes_max = {info.data['cache_bytes_max']}")
        return value
