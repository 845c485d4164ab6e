"""Settings of the query service. Each has a unit, a range and a reason."""

from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field, ValidationInfo, field_validator
from shread.settings import ReadSettings
from shruntime.memory import MIB, MemoryShare
from shruntime.settings import one_line


class QuerySettings(ReadSettings):
    service: ClassVar[str] = "query"

    agent_id: Annotated[str, AfterValidator(one_line)] = Field(
        "", max_length=128, description="name of this query service in `status`; empty: made from its address"
    )
    fetch_bytes_default: int = Field(
        4 * MIB, ge=1, le=32 * MIB, description="bytes of a fetch that does not say; large enough to pay for its call"
    )
    fetch_bytes_max: int = Field(
        16 * MIB, ge=1, le=32 * MIB, description="bytes a fetch may ask for; a gRPC message holds 64 MiB"
    )
    max_wait_ms_max: int = Field(
        60_000, ge=0, le=600_000, description="ms a fetch may wait; proxies cut calls that are silent for longer"
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

    @field_validator("fetch_bytes_max")
    @classmethod
    def _default_is_allowed(cls, value: int, info: ValidationInfo) -> int:
        if value < info.data.get("fetch_bytes_default", value):
            raise ValueError(f"must not be below fetch_bytes_default = {info.data['fetch_bytes_default']}")
        return value
