"""Settings of the segmenter."""

from typing import Annotated, ClassVar, Self

from pydantic import AfterValidator, Field, model_validator
from shruntime.memory import MIB, MemoryShare
from shruntime.settings import one_line
from shruntime.urls import url_of
from shstore.settings import StoreSettings


class SegmenterSettings(StoreSettings):
    service: ClassVar[str] = "segmenter"

    worker_id: Annotated[str, AfterValidator(one_line)] = Field(
        "", max_length=200, description="name in claims, logs and status; empty: host name and process id"
    )
    amqp_url: Annotated[str, AfterValidator(url_of("amqp", "amqps"))] = Field(
        "",
        repr=False,
        description="RabbitMQ that wakes the workers, amqp://user:password@host:port/vhost; empty: the event feed",
    )
    amqp_heartbeat_s: int = Field(
        30, ge=5, le=600, description="s between AMQP heartbeats; a dead broker is noticed after two"
    )

    claim_ttl_ms: int = Field(
        60_000,
        ge=1_000,
        le=600_000,
        description="ms a claimed buffer is kept from others without a renewal, of which there are three in it; less "
        "where the worker's session ends",
    )
    scan_interval_ms: int = Field(
        5_000,
        ge=50,
        le=3_600_000,
        description="ms between scans for buffers that no event announced; a cheap query each",
    )
    builds_in_flight_max: int = Field(
        default_factory=MemoryShare(part=2, least=1, most=2, unit=320 * MIB),
        ge=1,
        le=64,
        description="buffers built at once; one compresses while another uploads",
    )
    registrations_waiting_max: int = Field(
        32, ge=1, le=10_000, description="uploaded buffers that wait for an earlier one to register; some KiB each"
    )

    block_bytes_target: int = Field(
        MIB,
        ge=4096,
        le=4_000_000,  # what SegmentBuilder takes
        description="uncompressed bytes of a segment's block: what one cached read fetches",
    )
    segment_bytes_target: int = Field(
        default_factory=MemoryShare(part=64, least=MIB, most=64 * MIB),
        ge=64 * 1024,
        le=256 * MIB,
        description="bytes of small slices put together into one object; a larger slice is an object of its own",
    )
    segment_build_bytes_max: int = Field(
        320 * MIB,
        ge=MIB,
        le=1024 * MIB,
        description="bytes one build may hold in memory: the largest sealed slice (256 MiB), a batch and room. Uploads "
        "copy nothing, so all builds and a compaction hold (builds_in_flight_max + 1) times this at worst",
    )

    handover_retry_first_ms: int = Field(
        200, ge=1, le=60_000, description="ms of the first back-off of a buffer that failed; doubles, with full jitter"
    )
    handover_retry_max_ms: int = Field(
        5_000,
        ge=1,
        le=3_600_000,
        description="ms a failed buffer waits at most; while the store is away it is asked every 2 s and none is tried",
    )
    handover_refused_retry_ms: int = Field(
        30_000,
        ge=1,
        le=3_600_000,
        description="ms until a buffer that the store refuses (permissions, a request it does not take) is tried "
        "again: an operator has to act first, and `status` says so",
    )
    early_retry_first_ms: int = Field(
        20, ge=1, le=60_000, description="ms of the first back-off of a segment whose predecessor is not registered"
    )
    early_retry_max_ms: int = Field(
        1_000, ge=1, le=600_000, description="ms between tries of such a segment; its predecessor is seconds away"
    )
    early_wait_ms_max: int = Field(
        60_000,
        ge=0,
        le=3_600_000,
        description="ms such a segment waits in all before its buffer is given back; one claim's time to live",
    )

    compaction_interval_ms: int = Field(60_000, ge=50, le=86_400_000, description="ms between scans for small segments")
    compaction_small_bytes_max: int = Field(
        default_factory=MemoryShare(part=128, least=MIB, most=16 * MIB),
        ge=1024,
        le=1024 * MIB,
        description="bytes below which a segment is worth merging; at most half of the target",
    )
    compaction_target_bytes: int = Field(
        default_factory=MemoryShare(part=32, least=4 * MIB, most=64 * MIB),
        ge=4096,
        le=512 * MIB,
        description="bytes of a merged segment, about",
    )
    compaction_segments_min: int = Field(
        8,
        ge=2,
        le=10_000,
        description="a merged segment is at least this many times as large as the largest in it, and so of at least "
        "this many: each byte is written again log(target / first size) times to this base, and fewer than this many "
        "of a size wait",
    )
    retention_interval_ms: int = Field(
        60_000, ge=50, le=86_400_000, description="ms between applications of retention by time and size"
    )
    orphan_sweep_interval_ms: int = Field(
        600_000, ge=50, le=604_800_000, description="ms between listings of the store: 1,000 objects are one request"
    )
    orphan_grace_ms: int = Field(
        3_600_000,
        ge=1_000,
        le=604_800_000,
        description="ms an object and its declaration must be old before it may be an orphan: far beyond any upload",
    )
    orphan_confirm_ms: int = Field(
        300_000,
        ge=0,
        le=604_800_000,
        description="ms from noticing that an object is unreferenced to deleting it, for readers with an older plan",
    )
    orphan_dry_run: bool = Field(False, description="log orphans instead of deleting them")

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.compaction_small_bytes_max > self.compaction_target_bytes // 2:
            raise ValueError(
                f"compaction_small_bytes_max ({self.compaction_small_bytes_max}) must be at most half of "
                f"compaction_target_bytes ({self.compaction_target_bytes}), so that two fit together"
            )
        if 3 * self.rpc_timeout_ms > 2 * self.claim_ttl_ms:
            raise ValueError(
                f"rpc_timeout_ms ({self.rpc_timeout_ms}) must be at most two thirds of claim_ttl_ms "
                f"({self.claim_ttl_ms}): a claim is renewed after a third of its time, and a renewal that is answered "
                "at the last moment would come too late"
            )
        why = "waits grow from the first to the second"
        self.must_not_exceed("handover_retry_first_ms", "handover_retry_max_ms", why)
        self.must_not_exceed("early_retry_first_ms", "early_retry_max_ms", why)
        return self

    @property
    def merged_bytes_max(self) -> int:
        """compaction_target_bytes as far as a build can hold it."""
        return min(self.compaction_target_bytes, self.segment_build_bytes_max)

    @property
    def slices_together_bytes(self) -> int:
        """segment_bytes_target as far as a build can hold it: with a block that is not compressed yet, and a quarter
        for the frames of small segments."""
        return min(self.segment_bytes_target, (self.segment_build_bytes_max - self.block_bytes_target) * 3 // 4)
