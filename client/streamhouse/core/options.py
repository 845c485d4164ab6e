"""Options of producers and consumers, checked once, with the reason of every default."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from operator import index
from typing import Any, Literal, SupportsIndex, TypedDict, TypeVar, cast, get_args

from shformat import Codec, require_codec
from shformat.limits import INT64_MAX, MIB, UINT32_MAX
from shproto.acks import ACKS, Acks
from shproto.errors import InvalidArgument
from shproto.limits import (
    GROUP_SESSION_TIMEOUT_MS_MAX,
    GROUP_SESSION_TIMEOUT_MS_MIN,
    METADATA_LENGTH_MAX,
    NAME_LENGTH_MAX,
)
from shruntime.text import unit_of

from streamhouse.core.times import ms_of
from streamhouse.records import Record, RecordMetadata

Compression = Literal["lz4", "zstd", "gzip", "none"]
OnOutOfRange = Literal["error", "earliest", "latest"]
OnDataLoss = Literal["error", "skip"]
Start = Literal["earliest", "latest"] | int | datetime
"""Where reading begins: an end, an offset, a time, or with -N the last N records."""
Serializer = Callable[[Any], bytes | None]
Deserializer = Callable[[bytes], Any]
PartitionFunction = Callable[[str, bytes | None, int], int | None]

DAY_MS = 86_400_000
# Of one poll. Kafka's default, in which an application should be done with within max_poll_interval_ms; and as columns,
# which cost next to nothing each: 10 MB of records of 1 KiB.
POLL_RECORDS_MAX = 500
POLL_BATCHES_RECORDS_MAX = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ProducerOptions:
    """Options of a producer, within their limits. Raises InvalidArgument with option, limit and value."""

    acks: Acks = "wal"
    # Waits for company: at 100,000 records/s 5 ms make batches of 500 records, and cost 5 ms of latency.
    linger_ms: int = 5
    # A batch is a request, a frame of the log and a block of a segment: under load their costs are per batch. Records
    # of 1 KiB: 453 MB/s and 3.0 CPU s per million with 1 MiB, 224 and 7.1 with 256 KiB. Without load linger_ms decides.
    batch_bytes: int = MIB
    compression: Compression = "lz4"
    idempotent: bool = True
    # Requests per leader: 8 x 1 MiB fill a link of 1 GB/s with a round trip of 8 ms.
    max_in_flight: int = 8
    # A second of 64 MB/s: enough to ride out a leader change, little enough for a small process.
    buffer_bytes_max: int = 64 * MIB
    # Kafka's default; a leader's session takes 30 s to expire, so one fail-over fits with room.
    delivery_timeout_ms: int = 120_000
    # How long one try may take before the stream counts as broken; durable acks upload meanwhile.
    request_timeout_ms: int = 30_000
    client_id: str = ""
    # None: keys and values are bytes.
    key_serializer: Serializer | None = None
    value_serializer: Serializer | None = None
    # None: Kafka's, by the key.
    partitioner: PartitionFunction | None = None
    # Consumers find the trace of a record in its header; the header is written only where a span is recorded.
    trace_headers: bool = True

    def __post_init__(self) -> None:
        is_kafkas = self.acks in (0, 1, -1, "0", "1", "-1", "all")
        hint = '; Kafka\'s 0 is "none", its 1 and "all" are "wal" (fsynced) or "durable"' if is_kafkas else ""
        _one_of("acks", self.acks, tuple(ACKS), hint)
        _one_of("compression", self.compression, get_args(Compression))
        if self.compression == "zstd":
            require_codec(Codec.ZSTD)  # here: in the background the error would be of some batch
        _within("linger_ms", self.linger_ms, 0, 60_000)
        _within("batch_bytes", self.batch_bytes, 1, 8 * MIB)  # half the format's limit: headers and growth fit
        _within("max_in_flight", self.max_in_flight, 1, 1024)
        _within("buffer_bytes_max", self.buffer_bytes_max, self.batch_bytes, 1 << 40)
        _within("delivery_timeout_ms", self.delivery_timeout_ms, 1, DAY_MS)
        check_request_timeout(self.request_timeout_ms)
        _flag("idempotent", self.idempotent)
        _flag("trace_headers", self.trace_headers)
        _text("client_id", self.client_id, 0)
        _callable("key_serializer", self.key_serializer)
        _callable("value_serializer", self.value_serializer)
        _callable("partitioner", self.partitioner)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerOptions:
    """Options of a consumer, within their limits. Raises InvalidArgument with option, limit and value."""

    group: str | None = None
    start: Start = "earliest"
    # The first offset, or time, that is not read any more; None: there is none.
    end: int | datetime | None = None
    auto_commit: bool = True
    # Kafka's default: at most 5 s of records are read twice after a crash.
    auto_commit_interval_ms: int = 5_000
    # Of one response, decoded: four blocks of 1 MiB, so that decoding, not waiting, takes the time.
    fetch_bytes: int = 4 * MIB
    # Decoded and not yet handed over, all partitions together: four responses of each of four.
    prefetch_bytes_max: int = 64 * MIB
    # How soon a pattern finds topics that were created. Ten times as soon as Kafka's default; a list of 1,000 topics is
    # about 60 kB for each consumer then.
    topic_refresh_interval_ms: int = 30_000
    # 0: the server's default.
    session_timeout_ms: int = 0
    # Kafka's default: long beside what an application does with a record, short beside a night.
    max_poll_interval_ms: int = 300_000
    on_out_of_range: OnOutOfRange = "error"
    on_data_loss: OnDataLoss = "error"
    stop_at_end: bool = False
    # How long a call to the servers may take before it counts as failed.
    request_timeout_ms: int = 10_000
    # For how long consecutive failures to reach any server are retried before the application gets the error.
    retry_timeout_ms: int = 120_000
    client_id: str = ""
    # None: keys and values are bytes.
    key_deserializer: Deserializer | None = None
    value_deserializer: Deserializer | None = None

    def __post_init__(self) -> None:
        _one_of("on_out_of_range", self.on_out_of_range, ("error", "earliest", "latest"))
        _one_of("on_data_loss", self.on_data_loss, ("error", "skip"))
        _within("auto_commit_interval_ms", self.auto_commit_interval_ms, 10, DAY_MS)
        _within("fetch_bytes", self.fetch_bytes, 1, 32 * MIB)  # half of what one gRPC message may hold
        _within("prefetch_bytes_max", self.prefetch_bytes_max, 1, 1 << 40)
        _within("topic_refresh_interval_ms", self.topic_refresh_interval_ms, 10, DAY_MS)
        if self.session_timeout_ms != 0:
            _within(
                "session_timeout_ms",
                self.session_timeout_ms,
                GROUP_SESSION_TIMEOUT_MS_MIN,
                GROUP_SESSION_TIMEOUT_MS_MAX,
            )
        _within("max_poll_interval_ms", self.max_poll_interval_ms, 10, DAY_MS)
        check_request_timeout(self.request_timeout_ms)
        check_retry_timeout(self.retry_timeout_ms)
        _flag("auto_commit", self.auto_commit)
        _flag("stop_at_end", self.stop_at_end)
        _text("client_id", self.client_id, 0)
        _callable("key_deserializer", self.key_deserializer)
        _callable("value_deserializer", self.value_deserializer)
        if self.group is not None:
            _text("group", self.group, 1)
        if type(self.start) is int:
            _within("start", self.start, -INT64_MAX, INT64_MAX)
        else:
            _check_place("start", self.start, "an offset, -N (the last N records) or a datetime")
        _check_end(self.start, self.end)


def _check_end(start: Start, end: int | datetime | None) -> None:
    if isinstance(end, datetime):
        ms_of("end", end)
    elif isinstance(end, int):
        _within("end", end, 0, INT64_MAX)
        if isinstance(start, int) and start > end:
            raise InvalidArgument(
                f"end is {end}, must not be below start, {start}", field="end", value=end, limit=f"{start}.."
            )
    elif end is not None:
        raise InvalidArgument(f"end is {end!r}, must be an offset or a datetime", field="end", value=end)


@dataclass(frozen=True, slots=True)
class LastRecords:
    """The position before the last `count` records of a partition."""

    count: int


Place = Literal["earliest", "latest"] | int | datetime | LastRecords
"""A position that the servers find; a number is a time in milliseconds since 1970."""


def committed_position(given: object) -> tuple[int, str]:
    """Returns the offset and the metadata of a position to commit: an offset, or a pair of both. Raises
    InvalidArgument."""
    offset, metadata = given if isinstance(given, tuple) and len(given) == 2 else (given, "")
    number = offset_number("offset", offset)
    if not isinstance(metadata, str) or len(metadata) > METADATA_LENGTH_MAX:
        raise InvalidArgument(
            f"metadata is {metadata!r:.100}, must be text of at most {METADATA_LENGTH_MAX} characters",
            field="metadata",
            value=metadata,
            limit=METADATA_LENGTH_MAX,
        )
    return number, metadata


def committed_positions(offsets: object) -> dict[tuple[str, int], tuple[int, str]]:
    """Returns offset and metadata of each partition of {(topic, partition): offset}. Raises InvalidArgument for any
    other shape: a two-letter name in place of a pair would be taken apart into a topic and a partition."""
    wanted = "offsets must be {(topic, partition): offset}"
    if not isinstance(offsets, Mapping):
        hint = ""
        if isinstance(offsets, Record | RecordMetadata):
            hint = ": behind a record, {(record.topic, record.partition): record.offset + 1}"
        raise InvalidArgument(f"{wanted}, not {offsets!r:.100}{hint}", field="offsets", value=offsets)
    found = {}
    for where, at in offsets.items():
        pair = isinstance(where, tuple) and len(where) == 2
        if not pair or not isinstance(where[0], str) or not isinstance(where[1], SupportsIndex):
            raise InvalidArgument(f"{wanted}, {where!r:.100} is no (topic, partition)", field="offsets", value=where)
        found[where[0], partition_number(where[1])] = committed_position(at)
    return found


def seek_place(offset: Start) -> Start:
    """Returns where a seek goes, an offset as an int of Python. Raises InvalidArgument."""
    if isinstance(offset, SupportsIndex) and not isinstance(offset, bool):
        return offset_number("offset", offset)
    _check_place("offset", offset, "an offset or a datetime")
    return offset


def looked_up_place(name: str, at: Start, number: str) -> Start:
    """Returns a position to look up, a number as an int of Python. `number`: the meaning of one, for the error. Raises
    InvalidArgument."""
    if isinstance(at, SupportsIndex) and not isinstance(at, bool):
        return index(at)
    _check_place(name, at, f"{number} or a datetime")
    return at


def _check_place(name: str, place: object, others: str) -> None:
    """Refuses places that are neither an end nor a time. `others`: the places that are numbers, and times."""
    if isinstance(place, datetime):
        ms_of(name, place)
    elif not isinstance(place, str) or place not in ("earliest", "latest"):
        raise InvalidArgument(f"{name} is {place!r:.100}, must be earliest, latest, {others}", field=name, value=place)


def check_poll(timeout_ms: int, max_records: int) -> None:
    """Checks the limits of a poll. Raises InvalidArgument."""
    check_timeout_ms(timeout_ms)
    _within("max_records", max_records, 1, UINT32_MAX)


def check_timeout_ms(timeout_ms: int) -> None:
    """Checks how long a call may wait. Raises InvalidArgument."""
    _within("timeout_ms", timeout_ms, 0, DAY_MS)


def check_statement_timeout(timeout_ms: int | None) -> None:
    """Checks how long a SQL statement may run; None is the server's limit. Raises InvalidArgument."""
    if timeout_ms is not None:
        _within("timeout_ms", timeout_ms, 1, DAY_MS)


def check_statement(statement: object) -> None:
    """Checks that a statement is text. Raises InvalidArgument."""
    if not isinstance(statement, str):
        raise InvalidArgument(f"statement is {statement!r:.100}, must be text", field="statement", value=statement)
    try:
        statement.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"statement is no text: {error.reason}", field="statement", value=error.object) from error


def check_timestamp(timestamp_ms: int | datetime) -> None:
    """Checks a time to look up. Raises InvalidArgument."""
    if isinstance(timestamp_ms, datetime):
        ms_of("timestamp_ms", timestamp_ms)
    else:
        _within("timestamp_ms", timestamp_ms, -INT64_MAX, INT64_MAX)


class ProducerKwargs(TypedDict, total=False):
    """ProducerOptions as keyword arguments."""

    acks: Acks
    linger_ms: int
    batch_bytes: int
    compression: Compression
    idempotent: bool
    max_in_flight: int
    buffer_bytes_max: int
    delivery_timeout_ms: int
    request_timeout_ms: int
    client_id: str
    key_serializer: Serializer | None
    value_serializer: Serializer | None
    partitioner: PartitionFunction | None
    trace_headers: bool


class ConsumerKwargs(TypedDict, total=False):
    """ConsumerOptions as keyword arguments."""

    group: str | None
    start: Start
    end: int | datetime | None
    auto_commit: bool
    auto_commit_interval_ms: int
    fetch_bytes: int
    prefetch_bytes_max: int
    topic_refresh_interval_ms: int
    session_timeout_ms: int
    max_poll_interval_ms: int
    on_out_of_range: OnOutOfRange
    on_data_loss: OnDataLoss
    stop_at_end: bool
    request_timeout_ms: int
    retry_timeout_ms: int
    client_id: str
    key_deserializer: Deserializer | None
    value_deserializer: Deserializer | None


F = TypeVar("F", bound=Callable[..., None])


def shows_options(options: type) -> Callable[[F], F]:
    """Returns a decorator of an `__init__` that takes `**options`: `help`, editors and `inspect` then show the fields
    of the dataclass with their defaults."""

    def decorate(init: F) -> F:
        own = inspect.signature(init)
        named = [item for item in own.parameters.values() if item.kind is not inspect.Parameter.VAR_KEYWORD]
        fields = inspect.signature(options).parameters.values()
        keywords = [item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in fields]
        init.__signature__ = own.replace(parameters=[*named, *keywords])  # type: ignore[attr-defined]
        return init

    return decorate


def partitions_of(given: Sequence[tuple[str, int]], name: str = "assign") -> list[tuple[str, int]]:
    """Returns each (topic, partition) once. Raises InvalidArgument that names the argument."""
    found: dict[tuple[str, int], None] = {}
    for item in given:
        pair = isinstance(item, tuple | list) and len(item) == 2
        if not pair or not isinstance(item[0], str) or not isinstance(item[1], SupportsIndex):
            raise InvalidArgument(
                f"{name} must be a list of (topic, partition), not of {item!r}", field=name, value=item
            )
        found[item[0], index(item[1])] = None
    return list(found)


def check_topic(
    partitions: int,
    min_acks: str,
    retention_ms: int | None,
    retention_bytes: int | None,
    unclean_recovery_after_ms: int | None,
) -> None:
    """Checks that a message can carry the values; the coordinator knows the real limits.

    Raises InvalidArgument naming the field, its limit and the value.
    """
    _one_of("min_acks", min_acks, tuple(ACKS))
    _within("partitions", partitions, 1, UINT32_MAX)
    limits = {
        "retention_ms": retention_ms,
        "retention_bytes": retention_bytes,
        "unclean_recovery_after_ms": unclean_recovery_after_ms,
    }
    for name, value in limits.items():
        if value is not None:
            _within(name, value, 0, INT64_MAX)


def check_topic_name(topic: object) -> None:
    """Refuses what no topic can be named; which names are legal is the coordinator's to say. Raises InvalidArgument."""
    _text("topic", topic, 1)


def offset_number(name: str, offset: object) -> int:
    """Returns the offset, from whatever counts as an integer, such as numpy's. Raises InvalidArgument with name, limit
    and value."""
    number = index(offset) if isinstance(offset, SupportsIndex) and not isinstance(offset, bool) else offset
    _within(name, cast("int", number), 0, INT64_MAX)
    return cast("int", number)


def partition_number(partition: object) -> int:
    """Returns the partition's number, from whatever counts as an integer. Raises InvalidArgument."""
    number = index(partition) if isinstance(partition, SupportsIndex) else partition
    _within("partition", cast("int", number), 0, UINT32_MAX)
    return cast("int", number)


def check_timeout_s(name: str, timeout_s: object) -> None:
    """Checks a timeout: None (no limit) or seconds from 0 on. Raises InvalidArgument."""
    if timeout_s is None:
        return
    number = isinstance(timeout_s, int | float) and not isinstance(timeout_s, bool)
    if not number or not timeout_s >= 0:  # type: ignore[operator]  # also refuses NaN
        raise InvalidArgument(
            f"{name} is {timeout_s!r:.100}, must be seconds from 0 on, or None",
            field=name,
            value=timeout_s,
            limit="0..",
        )


def check_exit_timeout(exit_timeout_ms: int) -> None:
    """Checks that the option is within its limits. Raises InvalidArgument with option, limit and value."""
    _within("exit_timeout_ms", exit_timeout_ms, 0, DAY_MS)


def check_request_timeout(request_timeout_ms: int) -> None:
    """Checks that the option is within its limits. Raises InvalidArgument with option, limit and value."""
    _within("request_timeout_ms", request_timeout_ms, 1, DAY_MS)


def check_retry_timeout(retry_timeout_ms: int) -> None:
    """Checks that the option is within its limits. Raises InvalidArgument with option, limit and value."""
    _within("retry_timeout_ms", retry_timeout_ms, 1, DAY_MS)


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise InvalidArgument(f"{name} is {value!r}, must be True or False", field=name, value=value)


def _callable(name: str, value: object) -> None:
    if value is not None and not callable(value):
        raise InvalidArgument(
            f"{name} is {value!r:.100} ({type(value).__name__}), must be a callable or None", field=name, value=value
        )


def _text(name: str, value: object, least: int) -> None:
    if not isinstance(value, str) or not least <= len(value) <= NAME_LENGTH_MAX or "\0" in value:
        raise InvalidArgument(
            f"{name} is {value!r:.300}, must be {least} to {NAME_LENGTH_MAX} characters, none of them NUL",
            field=name,
            value=value,
            limit=NAME_LENGTH_MAX,
        )


def _one_of(name: str, value: object, allowed: tuple[str, ...], hint: str = "") -> None:
    if value not in allowed:
        raise InvalidArgument(
            f"{name} is {value!r}, must be one of {', '.join(allowed)}{hint}",
            field=name,
            value=value,
            limit="|".join(allowed),
        )


def _within(name: str, value: int, low: int, high: int) -> None:
    is_whole = type(value) is int
    if not is_whole or not low <= value <= high:
        # 1.0 lies within the limits: the type is what is wrong then, or seconds were meant.
        wanted = f"{low} to {high}" if is_whole else f"a whole number{unit_of(name)} (int), {low} to {high}"
        raise InvalidArgument(
            f"{name} is {value!r:.100}, must be {wanted}", field=name, value=value, limit=f"{low}..{high}"
        )
