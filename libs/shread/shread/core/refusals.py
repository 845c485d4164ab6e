"""Errors of readers, with the numbers they need to go on."""

from __future__ import annotations

from shcluster.index import PartitionIndex
from shproto.errors import DataLoss, OffsetBelowStart, OffsetBeyondEnd, StreamHouseError
from shproto.model import Segment

from shread.core.plan import BelowStart, BeyondEnd, Lost, ReadTail, next_readable


def refusal(partition: PartitionIndex, offset: int, step: BelowStart | BeyondEnd | Lost) -> StreamHouseError:
    """Returns the error for a read at `offset` that the plan answers with `step`."""
    match step:
        case BelowStart(log_start_offset):
            return OffsetBelowStart(
                f"{partition.name}: offset {offset} is below the start of the log, {log_start_offset}",
                topic=partition.topic,
                partition=partition.partition,
                offset=offset,
                log_start_offset=log_start_offset,
            )
        case BeyondEnd(high_watermark):
            return OffsetBeyondEnd(
                f"{partition.name}: offset {offset} is beyond the end, {high_watermark}",
                topic=partition.topic,
                partition=partition.partition,
                offset=offset,
                high_watermark=high_watermark,
            )
        case Lost():
            return DataLoss(
                f"{partition.name}: offsets {step.base_offset} to {step.end_offset} are lost: {step.reason}",
                topic=partition.topic,
                partition=partition.partition,
                base_offset=step.base_offset,
                end_offset=step.end_offset,
                object_key=step.object_key,
                next_offset=step.next_offset,
            )


def object_missing(partition: PartitionIndex, segment: Segment) -> DataLoss:
    """Returns the error for a registered segment whose object is gone. next_offset: where a reader can go on."""
    return DataLoss(
        f"{partition.name}: object {segment.object_key} with offsets {segment.base_offset} to {segment.end_offset} "
        "is registered, but not in the object store",
        topic=partition.topic,
        partition=partition.partition,
        base_offset=segment.base_offset,
        end_offset=segment.end_offset,
        object_key=segment.object_key,
        at=segment.object_at,
        next_offset=next_readable(partition, segment.end_offset),
    )


def damaged_tail(partition: PartitionIndex, step: ReadTail, offset: int, what: str) -> DataLoss:
    """Returns the error for an agent's answer that is not what `step` asked for."""
    return DataLoss(
        f"{partition.name}: agent {step.agent_id} answered for offset {offset} with damaged records: {what}",
        topic=partition.topic,
        partition=partition.partition,
        base_offset=offset,
        agent=step.agent_id,
        epoch=step.epoch,
    )


def with_next_offset(error: StreamHouseError, partition: PartitionIndex) -> StreamHouseError:
    """Returns an agent's DataLoss completed with the next readable offset, which the agent does not know."""
    if isinstance(error, DataLoss) and "end_offset" in error.details:
        error.details.setdefault("next_offset", str(next_readable(partition, int(error.details["end_offset"]))))
    return error
