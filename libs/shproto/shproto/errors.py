"""Every refusal and failure a StreamHouse service answers with.

A class says what happened and carries the numbers in `details`; its `status` is the gRPC status it travels
under, its `reason` the stable word for programs, `retriable` whether the same call may succeed later.
docs/errors.md lists them all. Services raise these, in process and over the network alike.
"""

from typing import Any, ClassVar

import grpc

from shproto.v1 import types_pb2

Code = grpc.StatusCode

PUBLIC_MODULE = "streamhouse.errors"
"""Module that applications import the errors from: `__module__` of every class that may reach one, so that tracebacks,
`repr`, `help` and pickles name what an `except` clause can name."""

# An error travels in gRPC's trailing metadata, which peers refuse beyond about 8 KiB (message and details, both forms).
# Messages echo the caller's values, so they are cut. Four bytes a character at worst.
MESSAGE_CHARS_MAX = 500
DETAIL_CHARS_MAX = 250


def _shortened(text: str, chars_max: int) -> str:
    return text if len(text) <= chars_max else f"{text[:chars_max]}… ({len(text)} characters)"


class StreamHouseError(Exception):
    """Base of all errors; an unknown reason, of a newer server, is decoded to this class."""

    __module__ = PUBLIC_MODULE

    reason: ClassVar[str] = "INTERNAL"
    status: ClassVar[grpc.StatusCode] = Code.INTERNAL
    retriable: ClassVar[bool] = False
    registry: ClassVar[dict[str, type["StreamHouseError"]]] = {}

    def __init__(self, message: str, *, retry_after_ms: int = 0, **details: object) -> None:
        self.message = _shortened(message, MESSAGE_CHARS_MAX)
        super().__init__(self.message)
        self.retry_after_ms = retry_after_ms
        self.details = {name: _shortened(str(value), DETAIL_CHARS_MAX) for name, value in details.items()}

    def __init_subclass__(cls, *, internal: bool = False) -> None:
        """Registers the reason, and gives the class its public module. A class without a reason of its own is a case
        of the one above, within a process: errors from elsewhere are not made into it. internal: only services meet the
        error, and `streamhouse.errors` does not have it."""
        if "reason" in cls.__dict__:
            cls.registry[cls.reason] = cls
        if cls.__module__ == __name__ and not internal:
            cls.__module__ = PUBLIC_MODULE

    def to_detail(self) -> types_pb2.ErrorDetail:
        """Returns the error as a message."""
        return types_pb2.ErrorDetail(
            reason=self.reason,
            message=self.message,
            details=self.details,
            retry_after_ms=self.retry_after_ms,
            retriable=self.retriable,
        )

    @staticmethod
    def from_detail(detail: types_pb2.ErrorDetail) -> "StreamHouseError":
        """Returns the error of a message, of the class that is registered for its reason."""
        kind = StreamHouseError.registry.get(detail.reason, StreamHouseError)
        error = kind(detail.message, retry_after_ms=detail.retry_after_ms)
        error.details = dict(detail.details)
        return error


# ---- the caller's mistake: the same call will fail again


class InvalidArgument(StreamHouseError):
    """A field is out of its limits. details: field, value, limit."""

    reason, status = "INVALID_ARGUMENT", Code.INVALID_ARGUMENT


class InvalidBatch(StreamHouseError):
    """The bytes are not a well-formed record batch. details: at (byte position), what."""

    reason, status = "INVALID_BATCH", Code.INVALID_ARGUMENT


class BatchTooLarge(StreamHouseError):
    """details: size_bytes, limit_bytes."""

    reason, status = "BATCH_TOO_LARGE", Code.INVALID_ARGUMENT


class AcksTooWeak(StreamHouseError):
    """The topic's minimum ack level is above the asked one. details: acks, min_acks."""

    reason, status = "ACKS_TOO_WEAK", Code.FAILED_PRECONDITION


class UnknownTopic(StreamHouseError):
    reason, status = "UNKNOWN_TOPIC", Code.NOT_FOUND


class UnknownPartition(StreamHouseError):
    """details: topic, partition, partitions."""

    reason, status = "UNKNOWN_PARTITION", Code.NOT_FOUND


class TopicExists(StreamHouseError):
    reason, status = "TOPIC_EXISTS", Code.ALREADY_EXISTS


class TableExists(StreamHouseError):
    """A SQL table of that name is declared already. details: table."""

    reason, status = "TABLE_EXISTS", Code.ALREADY_EXISTS


class UnknownTable(StreamHouseError):
    """No SQL table of that name is declared. details: table."""

    reason, status = "UNKNOWN_TABLE", Code.NOT_FOUND


class JobExists(StreamHouseError):
    """A SQL job of that name exists already. details: job."""

    reason, status = "JOB_EXISTS", Code.ALREADY_EXISTS


class UnknownJob(StreamHouseError):
    """No SQL job has that name. details: job."""

    reason, status = "UNKNOWN_JOB", Code.NOT_FOUND


class OffsetBelowStart(StreamHouseError):
    """Retention or delete-records removed it. details: topic, partition, offset, log_start_offset."""

    reason, status = "OFFSET_BELOW_START", Code.OUT_OF_RANGE


class OffsetBeyondEnd(StreamHouseError):
    """Nothing was written there yet. details: topic, partition, offset, high_watermark."""

    reason, status = "OFFSET_BEYOND_END", Code.OUT_OF_RANGE


class UnknownGroup(StreamHouseError):
    reason, status = "UNKNOWN_GROUP", Code.NOT_FOUND


class GroupNotEmpty(StreamHouseError):
    """Only a group without members can be reset or deleted. details: group, members."""

    reason, status = "GROUP_NOT_EMPTY", Code.FAILED_PRECONDITION


# ---- another process took over: look again, then go on


NOT_WRITTEN, UNKNOWN = "not_written", "unknown"
"""The detail `outcome` of NotLeader."""


class NotLeader(StreamHouseError):
    """This agent does not lead the partition (any more). Refresh the metadata, then retry. details: topic, partition,
    outcome (of the batch that was sent: NOT_WRITTEN or UNKNOWN; absent means unknown, too)."""

    reason, status, retriable = "NOT_LEADER", Code.FAILED_PRECONDITION, True


class Fenced(StreamHouseError):
    """The epoch or claim is no longer the live one. details: offered, or partition, epoch, offset, buffer_id."""

    reason, status = "FENCED", Code.ABORTED


class SessionExpired(StreamHouseError, internal=True):
    """Open a new session."""

    reason, status = "SESSION_EXPIRED", Code.ABORTED


class AgentIdTaken(StreamHouseError, internal=True):
    """A live process has the id, an agent with another write-ahead log or a segmenter; or an agent has the same log, of
    which one of the two is a copy. details: agent_id, address."""

    reason, status = "AGENT_ID_TAKEN", Code.ALREADY_EXISTS


class UnknownMember(StreamHouseError):
    """The group has forgotten this member: join again. details: group, member_id."""

    reason, status = "UNKNOWN_MEMBER", Code.ABORTED


class IllegalGeneration(StreamHouseError):
    """The commit is from before a rebalance, or for a partition of another member. details: generation, current."""

    reason, status = "ILLEGAL_GENERATION", Code.ABORTED


class SequenceGap(StreamHouseError):
    """A batch of this idempotent producer is missing. details: expected, got, producer_id."""

    reason, status = "SEQUENCE_GAP", Code.FAILED_PRECONDITION


class ProducerFenced(StreamHouseError):
    """A newer producer epoch has written, or fenced this one. details: producer_id, offered, held."""

    reason, status = "PRODUCER_FENCED", Code.FAILED_PRECONDITION


class ProducerNotFenced(StreamHouseError):
    """The leader of the partition has answered no fence of this producer epoch since it leads. Call FenceProducer, and
    go on behind the last sequence of its answer. Nothing was written. details: producer_id, producer_epoch."""

    reason, status = "PRODUCER_NOT_FENCED", Code.FAILED_PRECONDITION


class UnknownProducer(StreamHouseError):
    """The producer id was assigned before the metadata was restored from a backup, so that no service can tell if a
    retry of its batch was written before: take a new id. Or there is no producer of this name. details: producer_id,
    producer_ids_from; name."""

    reason, status = "UNKNOWN_PRODUCER", Code.FAILED_PRECONDITION


class PollIntervalExceeded(StreamHouseError):
    """Raised by the SDK: the application took no records from its consumer for so long that the consumer left its
    group. Iterating again joins anew, at the group's position by then. details: group, max_poll_interval_ms."""

    reason, status = "POLL_INTERVAL_EXCEEDED", Code.ABORTED


class OutcomeUnknown(StreamHouseError):
    """Raised by the SDK alone: a batch may or may not have been written, and trying again could write it twice. An
    earlier try got no answer, and the leader that was asked again does not know the producer's history. details: topic,
    partition, record_count, refusal (reason of the leader's answer)."""

    reason, status = "OUTCOME_UNKNOWN", Code.UNKNOWN


class SerializationError(StreamHouseError):
    """Raised by the SDK: a serializer or deserializer of the application failed on a record. A producer has sent
    nothing of the call; a consumer goes on behind the record when it is asked again. details: field (key or value),
    topic, and of a record read partition and offset, of one in a list position."""

    reason, status = "SERIALIZATION_ERROR", Code.INVALID_ARGUMENT
    record: Any = None
    """The record as it was read, its key and value as bytes; None when sending."""


class EventsPruned(StreamHouseError, internal=True):
    """Events after the position are not kept any more: take a new snapshot, or open a new session, and go on from
    there. details: after_position, pruned_position (of the last event that was pruned)."""

    reason, status = "EVENTS_PRUNED", Code.OUT_OF_RANGE


class MetadataWentBack(StreamHouseError):
    """PostgreSQL holds older metadata than the caller has seen, or another platform's: an old dump was put in its
    place, or an empty database. Calls are refused until `streamhouse restore` brings the metadata back. details:
    history_id, position (of PostgreSQL), known_history_id, known_position (seen by the caller)."""

    reason, status = "METADATA_WENT_BACK", Code.FAILED_PRECONDITION


class InvalidStatement(StreamHouseError):
    """A SQL statement cannot be run as it stands: it does not parse, names something that does not exist, or has a
    clause that is not supported. details: line, column (from 1) where they are known."""

    reason, status = "INVALID_STATEMENT", Code.INVALID_ARGUMENT


class StatementFailed(StreamHouseError):
    """A SQL statement met a value that it cannot compute with, such as a text cast to a number."""

    reason, status = "STATEMENT_FAILED", Code.FAILED_PRECONDITION


class StatementLimit(StreamHouseError):
    """A SQL statement was ended at a limit of the service. details: limit (name of the setting), value."""

    reason, status = "STATEMENT_LIMIT", Code.RESOURCE_EXHAUSTED


class StatementTimeout(StreamHouseError):
    """A SQL statement was ended, since it took longer than allowed. details: timeout_ms."""

    reason, status = "STATEMENT_TIMEOUT", Code.DEADLINE_EXCEEDED


# ---- pressure and absence: retry later, as hinted


RENEWED = "renewed"


class Overloaded(StreamHouseError):
    """A byte or count limit is reached, and nothing was begun. details: limit names, value; lease =
    renewed if a heartbeat had renewed the lease before. `retry_after_ms` hints when to try again."""

    reason, status, retriable = "OVERLOADED", Code.RESOURCE_EXHAUSTED, True


class DiskFull(StreamHouseError):
    """The write-ahead log cannot grow: no space on its disk, or no file descriptor. Nothing of the batch was kept."""

    reason, status, retriable = "DISK_FULL", Code.RESOURCE_EXHAUSTED, True


AWAY = "away"


class Unavailable(StreamHouseError):
    """A service, PostgreSQL or the object store did not answer in time; the outcome may be unknown. details: database =
    away where a coordinator answers that PostgreSQL does not.

    Two facts are for the caller's own process, and do not travel. `maybe_done` is False if certainly nothing was done:
    there was no connection to send the call on. `permanent` is True if trying again does not help: something answers at
    each address, and it is not the service; or the caller has closed the connection."""

    reason, status, retriable = "UNAVAILABLE", Code.UNAVAILABLE, True
    maybe_done = True
    permanent = False


class DurableTimeout(StreamHouseError):
    """The batch is in the write-ahead log, but not registered within the time asked. Retry with the same sequence."""

    reason, status, retriable = "DURABLE_TIMEOUT", Code.UNAVAILABLE, True


class ShuttingDown(StreamHouseError):
    reason, status, retriable = "SHUTTING_DOWN", Code.UNAVAILABLE, True


# ---- damage: never silence


class DataLoss(StreamHouseError):
    """Acknowledged bytes are damaged or missing. details: topic, partition, base_offset, end_offset, object_key, at."""

    reason, status = "DATA_LOSS", Code.DATA_LOSS


class Internal(StreamHouseError):
    """A defect of ours; the server's log has the trace."""

    reason, status = "INTERNAL", Code.INTERNAL
