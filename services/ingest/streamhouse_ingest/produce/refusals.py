"""Errors that answer a batch which was not appended, or may not have been."""

from shformat import ProducerStamp
from shproto.errors import (
    UNKNOWN,
    Overloaded,
    ProducerFenced,
    ProducerNotFenced,
    SequenceGap,
    StreamHouseError,
    Unavailable,
)

from streamhouse_ingest.log.logs import HeldLog, not_leader
from streamhouse_ingest.log.producers import FencedBy, NotFenced, OutOfSequence
from streamhouse_ingest.produce.draft import Decision, RangeExhausted

_RANGE_RETRY_MS = 100  # an extension takes one call to the coordinator


def refusal(held: HeldLog, stamp: ProducerStamp | None, decision: Decision) -> StreamHouseError:
    """Returns the error for a batch that `decision` does not append."""
    topic, partition = held.log.topic, held.log.key.partition
    match decision:
        case OutOfSequence(expected):
            assert stamp is not None
            return SequenceGap(
                f"{topic}/{partition}: batch with sequence {stamp.base_sequence}, expected {expected}",
                topic=topic,
                partition=partition,
                producer_id=stamp.producer_id,
                expected=expected,
                got=stamp.base_sequence,
            )
        case FencedBy(held_epoch):
            assert stamp is not None
            return producer_fenced(held, stamp.producer_id, stamp.producer_epoch, held_epoch)
        case NotFenced():
            assert stamp is not None
            return ProducerNotFenced(
                f"{topic}/{partition}: producer {stamp.producer_id} has not fenced epoch {stamp.producer_epoch} at "
                "this leader; nothing was written",
                producer_id=stamp.producer_id,
                producer_epoch=stamp.producer_epoch,
            )
        case RangeExhausted(limit_offset):
            return Overloaded(
                f"{topic}/{partition}: offsets up to {limit_offset} are used up, more are being asked for",
                retry_after_ms=_RANGE_RETRY_MS,
                limit="limit_offset",
                value=limit_offset,
            )
        case _:
            return not_leader(topic, partition, "its lease has moved or run out")


def producer_fenced(held: HeldLog, producer_id: int, offered: int, newest: int) -> ProducerFenced:
    """Returns the error for an older epoch of a producer."""
    return ProducerFenced(
        f"{held.log.topic}/{held.log.key.partition}: producer epoch {offered}, {newest} has written or fenced",
        producer_id=producer_id,
        offered=offered,
        held=newest,
    )


def lease_lost(held: HeldLog) -> StreamHouseError:
    """Returns the error for a batch during whose write the lease ran out: the agent may not have led any more."""
    log = held.log
    why = "its lease ran out while the batch was written; outcome unknown"
    return not_leader(log.topic, log.key.partition, why, outcome=UNKNOWN)


def log_failed() -> StreamHouseError:
    """Returns the error for all batches after a failure that leaves the state of the log unknown."""
    return Unavailable("the write-ahead log failed; the agent has to restart. The outcome of the batch is unknown")


def overloaded(limit: str, limit_bytes: int, value: int, retry_after_ms: int) -> Overloaded:
    """Returns the error for a request beyond the limit named `limit` (G7: overload is refused, not buffered)."""
    return Overloaded(
        f"{limit} is {limit_bytes} bytes, {value} are in use",
        retry_after_ms=retry_after_ms,
        limit=limit,
        limit_bytes=limit_bytes,
        value=value,
    )
