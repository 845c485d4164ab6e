"""Settings of the query service. Each has a unit, a range and a reason."""

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field, ValidationInfo, field_validator
from shruntime.memory import MIB, MemoryShare
from shruntime.settings import one_line
from shruntime.urls import url_of
from shstore.settings import StoreSettings


class QuerySettings(StoreSettings):
    service: ClassVar[str] = "query"

    agent_id: Annotated[str, AfterValidator(one_line)] = Field(
        "", max_length=128, description="name of this query service in `status`; empty: made from its address"
    )
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
    fetch_bytes_default: int = Field(
        4 * MIB, ge=1, le=32 * MIB, description="bytes of a fetch that does not say; large enough to pay for its call"
    )
    fetch_bytes_max: int = Field(
        16 * MIB, ge=1, le=32 * MIB, description="bytes a fetch may ask for; a gRPC message holds 64 MiB"
    )
    max_wait_ms_max: int = Field(
        60_000, ge=0, le=600_000, description="ms a fetch may wait; proxies cut calls that are silent for longer"
    )
    catch_up_ms: int = Field(
        3_000,
        ge=0,
        le=60_000,
        description="ms to wait for the event feed where an agent has dropped what is registered; it takes about 10",
    )
    subscribe_positions_max: int = Field(
        1_000, ge=1, le=100_000, description="partitions of one subscription; each may hold one batch in memory"
    )
    subscribe_buffer_bytes: int = Field(
        default_factory=MemoryShare(part=64, least=MIB, most=32 * MIB),
        ge=MIB,
        le=1 << 32,
        description="bytes read ahead of one subscriber that does not keep up",
    )
    subscribe_connection_bytes: int = Field(
        default_factory=MemoryShare(part=16, least=16 * MIB, most=128 * MIB),
        ge=MIB,
        le=1 << 40,
        description="bytes read ahead of all subscribers on one connection; many consumers in a process share one",
    )
    subscribe_heartbeat_ms: int = Field(
        30_000,
        ge=10,
        le=60_000,
        description="ms between the empty responses that a subscriber at the end gets so that no proxy takes it for "
        "dead; all news is sent at once. Idle subscribers cost these, and nothing else",
    )
    decodes_at_once_max: int = Field(
        1,
        ge=1,
        le=64,
        description="large responses (above 512 KiB) in the plain form made at once, each a thread; connections have "
        "their turns",
    )
    decode_queue_bytes_max: int = Field(
        default_factory=MemoryShare(part=32, least=8 * MIB, most=64 * MIB),
        ge=MIB,
        le=1 << 40,
        description="bytes of batches that wait for that, beyond which callers get OVERLOADED",
    )
    metrics_topics_max: int = Field(
        100,
        ge=0,
        le=100_000,
        description="topics that have metrics of their own; further ones are together, as topic `(other)`: each takes "
        "memory in the monitoring system for as long as it keeps anything",
    )
    group_lag_interval_ms: int = Field(
        15_000,
        ge=100,
        le=3_600_000,
        description="ms between scans of the lag of consumer groups, a small call to the coordinator for each group; "
        "only while metrics are on",
    )
    metrics_group_topics_max: int = Field(
        200,
        ge=0,
        le=100_000,
        description="pairs of consumer group and topic whose lag is shown; of more, those that are furthest behind",
    )

    @field_validator("cache_chunk_bytes")
    @classmethod
    def _chunks_fit_the_cache(cls, value: int, info: ValidationInfo) -> int:
        if value > info.data.get("cache_bytes_max", value):
            raise ValueError(f"must not be above cache_bytes_max = {info.data['cache_bytes_max']}")
        return value

    @field_validator("fetch_bytes_max")
    @classmethod
    def _default_is_allowed(cls, value: int, info: ValidationInfo) -> int:
        if value < info.data.get("fetch_bytes_default", value):
            raise ValueError(f"must not be below fetch_bytes_default = {info.data['fetch_bytes_default']}")
        return value
