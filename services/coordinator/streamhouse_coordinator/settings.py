"""Settings of the coordinator."""

from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field
from shruntime.settings import CommonSettings
from shruntime.urls import url_of


class CoordinatorSettings(CommonSettings):
    service: ClassVar[str] = "coordinator"

    pg_dsn: Annotated[str, AfterValidator(url_of("postgresql", "postgres"))] = Field(
        "postgresql://postgres@127.0.0.1:5432/postgres",
        repr=False,
        description="PostgreSQL, as a libpq URI; a primary and its standbys separated by commas",
    )
    pg_pool_max: int = Field(
        10,
        ge=2,
        le=1000,
        description="connections per coordinator; events are appended one transaction at a time anyway",
    )
    pg_timeout_ms: int = Field(
        5_000,
        ge=100,
        le=600_000,
        description="ms PostgreSQL may take per statement until a call is UNAVAILABLE; half of rpc_timeout_ms",
    )
    pg_migration_timeout_ms: int = Field(
        600_000,
        ge=100,
        le=86_400_000,
        description="ms the migrations at a start may take, waiting for another coordinator's included, until they are "
        "tried again; an index over the segments of a large cluster takes minutes",
    )
    amqp_url: Annotated[str, AfterValidator(url_of("amqp", "amqps"))] = Field(
        "", repr=False, description="RabbitMQ that events are published to; empty: no publishing"
    )
    amqp_timeout_ms: int = Field(10_000, ge=100, le=600_000, description="ms RabbitMQ may take to confirm a batch")
    coordinator_id: str = Field(
        "", max_length=249, description="name in status and metadata; empty: a new one each start"
    )

    session_ttl_ms: int = Field(
        30_000, ge=100, le=3_600_000, description="ms without a heartbeat until an agent's leases go to others"
    )
    heartbeat_interval_ms: int = Field(
        10_000,
        ge=10,
        le=600_000,
        description="ms between heartbeats; a third of session_ttl_ms, so that two may be lost",
    )
    session_sweep_interval_ms: int = Field(
        1_000, ge=10, le=600_000, description="ms between looks for expired sessions, group members and claims"
    )
    probe_timeout_ms: int = Field(
        2_000, ge=10, le=60_000, description="ms to reach an agent whose event stream broke; refused means it is gone"
    )
    range_width_offsets: int = Field(
        2**30, ge=16, le=2**48, description="offsets reserved per epoch; a takeover skips at most this many of 2^63"
    )
    partitions_per_topic_max: int = Field(10_000, ge=1, le=100_000, description="partitions of one topic")
    topics_max: int = Field(
        10_000, ge=1, le=1_000_000, description="topics in all; the query index holds them in memory"
    )

    group_session_timeout_ms: int = Field(
        10_000,
        ge=100,
        le=3_600_000,
        description="ms without a heartbeat until a group member is out, unless it asks otherwise",
    )
    group_heartbeat_interval_ms: int = Field(
        3_000, ge=10, le=600_000, description="ms between a group member's heartbeats; Kafka's default"
    )
    group_members_max: int = Field(1_000, ge=1, le=100_000, description="members of one consumer group")

    claim_ttl_ms_max: int = Field(
        600_000,
        ge=1_000,
        le=3_600_000,
        description="ms a claim may be asked for; the work of a segmenter that dies without a session waits this long",
    )
    events_poll_interval_ms: int = Field(
        1_000, ge=10, le=60_000, description="ms until new events are seen without PostgreSQL's NOTIFY"
    )
    events_batch: int = Field(1_000, ge=1, le=100_000, description="events read from PostgreSQL at once")
    events_cached: int = Field(
        10_000, ge=1, le=1_000_000, description="newest events kept in memory for followers; older ones are read again"
    )
    outbox_batch: int = Field(500, ge=1, le=10_000, description="events published to RabbitMQ per transaction")
    retention_batch: int = Field(
        1_000, ge=1, le=100_000, description="segments removed per partition and transaction; the next run goes on"
    )
