"""Settings of the coordinator."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator
from shproto.limits import NAME_LENGTH_MAX
from shruntime.settings import CommonSettings, one_line
from shruntime.urls import url_of

# Share of a lease within which two heartbeats must be answered; the rest is the agents' margin (lease_margin_ms, 2 s by
# default).
LEASE_SHARE = 0.75
# Consecutive sweeps of all coordinators that have to be missing in an outage: one or two are a sign of load.
MISSED_SWEEPS = 3
# Heartbeats of a group member in its session_timeout_ms, so that two may be lost.
GROUP_HEARTBEATS = 3


class CoordinatorSettings(CommonSettings):
    service: ClassVar[str] = "coordinator"

    pg_dsn: Annotated[str, AfterValidator(url_of("postgresql", "postgres"))] = Field(
        "postgresql://postgres@127.0.0.1:5432/postgres",
        repr=False,
        description="PostgreSQL, as a libpq URI; a primary and its standbys separated by commas",
    )
    pg_listen_dsn: Annotated[str, AfterValidator(url_of("postgresql", "postgres"))] = Field(
        "",
        repr=False,
        description="PostgreSQL without the pooler that pg_dsn leads through, for LISTEN; empty: pg_dsn, or, through a "
        "pooler, events are polled every events_poll_interval_ms",
    )
    pg_pooler: Literal["auto", "none", "transaction"] = Field(
        "auto",
        description="what pg_dsn leads to: auto finds out and takes any pooler for one that gives out transactions; "
        "none: the server, or a pooler that gives out sessions; transaction: pgbouncer with pool_mode=transaction",
    )
    pg_pool_max: int = Field(
        10,
        ge=2,
        le=1000,
        description="connections per coordinator, abandoned statements that may still run included; events are "
        "appended one transaction at a time anyway",
    )
    pg_pool_clients_max: int = Field(
        5,
        ge=1,
        le=1000,
        description="of pg_pool_max, connections for calls of clients and operators, at most all but one: the others "
        "stay for leases, registrations and sweeps, however many clients call",
    )
    pg_lock_waiting_max: int = Field(
        1_000,
        ge=1,
        le=100_000,
        description="calls of clients that wait for one lock, of a group or for topics; beyond, callers get "
        "OVERLOADED. All members of a group ask at once after a change (group_members_max)",
    )
    pg_waiting_max: int = Field(
        5_000,
        ge=1,
        le=1_000_000,
        description="calls of clients that wait for locks or connections, in all; beyond, callers get OVERLOADED. "
        "Fewer than that are done within pg_timeout_ms, for which a call waits",
    )
    pg_timeout_ms: int = Field(
        5_000,
        ge=100,
        le=600_000,
        description="ms PostgreSQL may take per statement until a call is UNAVAILABLE; half of rpc_timeout_ms. It ends "
        "statements itself after 80 % of this, and waits for locks after 60 %",
    )
    pg_transaction_idle_ms: int = Field(
        2_000,
        ge=100,
        le=600_000,
        description="ms a transaction may wait for its coordinator until PostgreSQL ends it: a coordinator that is cut "
        "off or frozen keeps its locks from the others for so long",
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
    amqp_timeout_ms: int = Field(
        10_000,
        ge=100,
        le=600_000,
        description="ms RabbitMQ may take to confirm a batch; if a coordinator is killed meanwhile, the others go on "
        "after this and 2 * pg_timeout_ms",
    )
    coordinator_id: Annotated[str, AfterValidator(one_line)] = Field(
        "", max_length=NAME_LENGTH_MAX, description="name in status and metadata; empty: a new one each start"
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
        1_000, ge=10, le=600_000, description="ms between scans for expired sessions, group members and claims"
    )
    probe_timeout_ms: int = Field(
        2_000, ge=10, le=60_000, description="ms to reach an agent whose event stream broke; refused means it is gone"
    )
    cut_off_after_ms: int = Field(
        15_000,
        ge=100,
        le=3_600_000,
        description="ms for which several segmenters or query services must have failed to reach an agent until its "
        "partitions go to others; longer than an agent takes to restart",
    )
    cut_off_hold_ms: int = Field(
        30_000,
        ge=100,
        le=3_600_000,
        description="ms for which they must reach it again until it leads; doubles each time, up to 32 times that",
    )
    moves_per_sweep_max: int = Field(
        500,
        ge=1,
        le=100_000,
        description="partitions that are asked to move, for balance or from an agent that cannot lead, between two "
        "sweeps; an agent hands 100 over at a time",
    )
    range_width_offsets: int = Field(
        2**30, ge=16, le=2**48, description="offsets reserved per epoch; a takeover skips at most this many of 2^63"
    )
    producer_fences_per_partition_max: int = Field(
        1_000,
        ge=1,
        le=10_000,
        description="producers that fence (FenceProducer) in one partition, which are never forgotten: some 130 bytes "
        "each in each sealed buffer that they wrote to",
    )
    partitions_per_topic_max: int = Field(10_000, ge=1, le=100_000, description="partitions of one topic")
    topics_max: int = Field(
        10_000, ge=1, le=1_000_000, description="topics in all; the query index holds them in memory"
    )
    sql_jobs_max: int = Field(
        1_000, ge=1, le=10_000, description="continuous queries; each writes some rows a second to PostgreSQL"
    )
    named_producers_max: int = Field(
        10_000, ge=1, le=1_000_000, description="producers that have a name: some 100 bytes each, until deleted"
    )
    sql_tables_max: int = Field(
        10_000, ge=1, le=1_000_000, description="tables declared for SQL; SQL and query services hold them in memory"
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
    events_retention_ms: int = Field(
        6 * 3_600_000,
        ge=1_000,
        le=366 * 86_400_000,
        description="ms events are kept for followers that are away; one away for longer starts over from a snapshot",
    )
    events_kept_min: int = Field(
        1_000, ge=1, le=100_000_000, description="newest events that are kept whatever their age, to be compared with"
    )
    events_prune_interval_ms: int = Field(
        60_000, ge=10, le=86_400_000, description="ms between scans for events to prune; a minute's worth is little"
    )
    outbox_retention_ms: int = Field(
        7 * 86_400_000,
        ge=1_000,
        le=366 * 86_400_000,
        description="ms events are kept for RabbitMQ while it is away, if a coordinator publishes to it",
    )
    outbox_batch: int = Field(500, ge=1, le=10_000, description="events published to RabbitMQ at once")
    retention_batch: int = Field(
        1_000, ge=1, le=100_000, description="segments removed per partition and transaction; the next run goes on"
    )

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        self._leases_outlive_silence()
        self._leases_outlive_what_is_no_outage()
        if self.group_heartbeat_interval_ms * GROUP_HEARTBEATS > self.group_session_timeout_ms:
            raise ValueError(
                f"group_heartbeat_interval_ms ({self.group_heartbeat_interval_ms}) must be at most a third of "
                f"group_session_timeout_ms ({self.group_session_timeout_ms}), so that two heartbeats may be lost"
            )
        if self.pg_timeout_ms >= self.rpc_timeout_ms:
            raise ValueError(
                f"pg_timeout_ms ({self.pg_timeout_ms}) must be below rpc_timeout_ms ({self.rpc_timeout_ms}): callers "
                "would time out before they get the error that PostgreSQL is away"
            )
        if self.probe_timeout_ms >= self.rpc_timeout_ms:
            raise ValueError(
                f"probe_timeout_ms ({self.probe_timeout_ms}) must be below rpc_timeout_ms ({self.rpc_timeout_ms}): a "
                "process whose session another one has would time out before the coordinator knows if that one is there"
            )
        return self

    def _leases_outlive_silence(self) -> None:
        """Checks that leases last from an answered heartbeat to the next. While PostgreSQL is away, an agent goes on as
        long as coordinators answer: a heartbeat is answered after pg_timeout_ms, and the next is sent
        heartbeat_interval_ms later and answered after another pg_timeout_ms. The lease that the first renewed must not
        run out before. The same holds if a frozen coordinator locks the rows of a heartbeat, for
        pg_transaction_idle_ms, or twice that (docs/postgresql.md)."""
        for name in ("pg_timeout_ms", "pg_transaction_idle_ms"):
            silent_ms = 2 * getattr(self, name) + self.heartbeat_interval_ms
            if silent_ms > LEASE_SHARE * self.session_ttl_ms:
                what = "PostgreSQL is away" if name == "pg_timeout_ms" else "a frozen coordinator holds its locks"
                raise ValueError(
                    f"session_ttl_ms ({self.session_ttl_ms}) is too short for {name} ({getattr(self, name)}) and "
                    f"heartbeat_interval_ms ({self.heartbeat_interval_ms}): while {what} agents hear from the "
                    f"coordinator every 2 * {name} + heartbeat_interval_ms = {silent_ms} ms, which must be at most "
                    f"{LEASE_SHARE:.0%} of session_ttl_ms; make that {-int(-silent_ms // LEASE_SHARE)} at least"
                )

    def _leases_outlive_what_is_no_outage(self) -> None:
        """Checks that leases outlast the longest silence that is no outage. The time of an outage is added to all
        leases (service/outages.py), but up to MISSED_SWEEPS missing sweeps are no outage, so leases must last for
        them."""
        for lease, interval in (
            ("session_ttl_ms", "heartbeat_interval_ms"),
            ("group_session_timeout_ms", "group_heartbeat_interval_ms"),
        ):
            unnoticed_ms = getattr(self, interval) + MISSED_SWEEPS * self.session_sweep_interval_ms
            if unnoticed_ms >= getattr(self, lease):
                raise ValueError(
                    f"session_sweep_interval_ms ({self.session_sweep_interval_ms}) is too long for {lease} "
                    f"({getattr(self, lease)}) and {interval} ({getattr(self, interval)}): PostgreSQL may be away for "
                    f"{MISSED_SWEEPS} sweeps before that is made up for, so {interval} + {MISSED_SWEEPS} * "
                    f"session_sweep_interval_ms = {unnoticed_ms} ms must be below {lease}"
                )
