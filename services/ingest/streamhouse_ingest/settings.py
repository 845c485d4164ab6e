"""Settings of the ingest agent."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from shformat import WAL_AHEAD_BYTES_MAX
from shruntime.memory import MIB, MemoryShare
from shruntime.settings import CommonSettings

GIB = 1024 * MIB


class IngestSettings(CommonSettings):
    service: ClassVar[str] = "ingest"

    agent_id: str = Field(
        "ingest-0",
        min_length=1,
        max_length=128,
        pattern=r"^[A-Za-z0-9._-]+$",
        description="name of this agent, the same after every restart; the write-ahead log belongs to it",
    )
    wal_dir: str = Field("wal", min_length=1, description="directory of the write-ahead log, on a local disk")
    wal_fsync: Literal["always", "interval", "never"] = Field(
        "always",
        description="always: fsync before the ack; interval: acks do not wait, a power loss may cost the last of them; "
        "never: the operating system decides, for tests",
    )
    wal_fsync_interval_ms: int = Field(
        100, ge=1, le=60_000, description="ms between fsyncs with wal_fsync=interval: what a power loss may cost"
    )
    wal_file_bytes: int = Field(
        128 * MIB,
        ge=64 * 1024,
        le=4 * GIB,
        description="bytes of one log file; space is given back in files, so two sealed buffers' worth",
    )
    wal_ahead_bytes: int = Field(
        MIB,
        ge=0,
        le=WAL_AHEAD_BYTES_MAX,
        description="bytes of zeros that a log file has behind its last batch, at most a quarter of wal_file_bytes: "
        "with wal_fsync=always groups of up to a quarter of these are written over them, so that their fsync has no "
        "file size to journal; 0: off",
    )
    wal_bytes_max: int = Field(
        8 * GIB,
        ge=256 * 1024,
        description="bytes of the whole log, beyond which producers are refused: minutes of an object store outage",
    )
    wal_full_grace_ms: int = Field(
        10_000,
        ge=0,
        le=3_600_000,
        description="ms after which an agent whose disk has no room for its log asks for its partitions to be moved to "
        "others: longer than a segment takes to be uploaded, which gives room back",
    )
    wal_group_bytes_max: int = Field(
        8 * MIB,
        ge=64 * 1024,
        le=256 * MIB,
        description="bytes written with one fsync: about 10 ms of a disk's bandwidth",
    )
    memory_bytes_max: int = Field(
        default_factory=MemoryShare(part=8, least=16 * MIB, most=512 * MIB),
        ge=1 * MIB,
        description="bytes of batches held in memory; beyond, they are read from the log again when asked for",
    )
    tail_cache_bytes: int = Field(
        default_factory=MemoryShare(part=64, least=MIB, most=64 * MIB),
        ge=0,
        description="bytes of registered batches kept for readers that are just behind: one sealed buffer",
    )
    queue_bytes_max: int = Field(
        default_factory=MemoryShare(part=32, least=16 * MIB, most=64 * MIB),
        ge=64 * 1024,
        description="bytes waiting to be written, beyond which producers are refused: eight groups",
    )
    connection_bytes_in_flight_max: int = Field(
        default_factory=MemoryShare(part=64, least=8 * MIB, most=32 * MIB),
        ge=64 * 1024,
        description="bytes of one connection's requests that may be unanswered, beyond which it is refused, or read no "
        "further: half of the queue, so that one client cannot fill it",
    )
    checks_at_once_max: int = Field(
        1,
        ge=1,
        le=64,
        description="large batches (above 512 KiB unpacked) checked at once, each a thread and up to 64 MiB for 0.2 s; "
        "connections have their turns",
    )
    checks_queue_bytes_max: int = Field(
        default_factory=MemoryShare(part=64, least=8 * MIB, most=32 * MIB),
        ge=64 * 1024,
        description="bytes of large batches that wait to be checked, beyond which producers are refused: half of what "
        "may then wait to be written",
    )
    batch_bytes_max: int = Field(
        default_factory=MemoryShare(part=128, least=2 * MIB, most=16 * MIB),
        ge=1024,
        le=16 * MIB,
        description="bytes of one record batch; the format's own limit is 16 MiB. Each connection may have one in "
        "memory that waits for its turn",
    )
    records_per_plain_request_max: int = Field(
        10_000, ge=1, le=100_000, description="plain records in one request: 20 ms of encoding on the server"
    )
    producers_per_partition_max: int = Field(
        1_000,
        ge=1,
        le=100_000,
        description="idempotent producers remembered per partition, 130 bytes each in each sealed buffer",
    )
    seal_bytes: int = Field(
        default_factory=MemoryShare(part=64, least=MIB, most=64 * MIB),
        ge=64 * 1024,
        le=256 * MIB,
        description="bytes of one partition that make a segment: S3 likes large objects",
    )
    seal_age_ms: int = Field(
        10_000,
        ge=10,
        le=3_600_000,
        description="ms after which a buffer is sealed anyway: how old the log's tail gets; up to 60 s while 8 and "
        "more sealed buffers wait for registration",
    )
    durable_linger_ms: int = Field(
        20,
        ge=0,
        le=10_000,
        description="ms a durable ack waits for others before its buffer is sealed: one object for all; doubles with "
        "every 8 sealed buffers that wait for registration",
    )
    produce_timeout_ms: int = Field(
        30_000, ge=1, le=600_000, description="ms a produce call waits for its ack level when it names no time itself"
    )
    timestamp_ahead_ms_max: int = Field(
        86_400_000,
        ge=0,
        description="ms a timestamp may lie ahead of the server's clock; one further ahead would defeat retention",
    )
    stream_requests_in_flight_max: int = Field(
        256, ge=1, le=100_000, description="requests of one ProduceStream that may be unanswered"
    )
    stream_bytes_in_flight_max: int = Field(
        default_factory=MemoryShare(part=128, least=4 * MIB, most=16 * MIB),
        ge=1024,
        description="bytes of one ProduceStream that may be unanswered: a quarter of the queue",
    )
    read_tail_bytes_max: int = Field(
        8 * MIB, ge=64 * 1024, le=32 * MIB, description="bytes of one ReadTail answer, whatever was asked for"
    )
    read_tail_wait_ms_max: int = Field(30_000, ge=0, le=600_000, description="ms a ReadTail may wait for new records")
    metrics_topics_max: int = Field(
        100,
        ge=0,
        le=100_000,
        description="topics that have metrics of their own; further ones are together, as topic `(other)`: each takes "
        "memory in the monitoring system for as long as it keeps anything",
    )
    lease_margin_ms: int = Field(
        2_000,
        ge=0,
        le=600_000,
        description="ms before its lease runs out that the agent stops acknowledging: clock drift",
    )
    move_timeout_ms: int = Field(
        10_000,
        ge=1,
        le=600_000,
        description="ms a partition that moves away may refuse writes while its last records register",
    )
    retry_first_ms: int = Field(
        50, ge=1, le=60_000, description="ms before a failed call to the coordinator is repeated"
    )
    retry_max_ms: int = Field(5_000, ge=1, le=600_000, description="ms that such a wait grows to")

    @property
    def space_ahead_bytes(self) -> int:
        """Number of bytes that files of the log have ahead of their last batch."""
        return min(self.wal_ahead_bytes, self.wal_file_bytes // 4) if self.wal_fsync == "always" else 0

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.wal_bytes_max < 2 * self.wal_file_bytes:
            raise ValueError(
                f"wal_bytes_max ({self.wal_bytes_max}) must hold two files of wal_file_bytes ({self.wal_file_bytes})"
            )
        for name in ("queue_bytes_max", "checks_queue_bytes_max"):
            if (size_bytes := getattr(self, name)) < self.batch_bytes_max:
                raise ValueError(f"{name} ({size_bytes}) must hold one of batch_bytes_max ({self.batch_bytes_max})")
        self.must_not_exceed("retry_first_ms", "retry_max_ms", "waits grow from the first to the second")
        return self
