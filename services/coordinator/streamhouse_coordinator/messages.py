"""Converts between protobuf messages and the coordinator's rows and events. Incoming messages are checked; errors are
InvalidArgument."""

import hashlib
import json
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import replace

from shformat.limits import INT64_MAX, UINT32_MAX
from shproto.convert import segments_from_proto
from shproto.errors import InvalidArgument
from shproto.events import Slice
from shproto.limits import METADATA_LENGTH_MAX, NAME_LENGTH_MAX, SNAPSHOT_BYTES_MAX, TOPIC_ID_BYTES
from shproto.model import Segment
from shproto.v1 import coordinator_pb2 as pb
from shproto.v1 import types_pb2

from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.deletion import DeletionGrace
from streamhouse_coordinator.core.fences import AskedFence
from streamhouse_coordinator.core.groups import split_name
from streamhouse_coordinator.core.names import (
    check_name,
    check_number,
    check_text,
    check_topic,
)
from streamhouse_coordinator.core.sessions import WalEnds
from streamhouse_coordinator.core.tables import RangeRowKey
from streamhouse_coordinator.core.topics import OPTIONAL_LIMITS, AlterTopic
from streamhouse_coordinator.ports import ProjectionCheck
from streamhouse_coordinator.segment_keys import check_segment_key
from streamhouse_coordinator.service import group_admin
from streamhouse_coordinator.service.fences import RegisteredFence
from streamhouse_coordinator.service.groups import Commit
from streamhouse_coordinator.service.objects import JudgedObject
from streamhouse_coordinator.service.sessions import Grant
from streamhouse_coordinator.service.sql_jobs import JobGrant, JobView, Progress

ID_LENGTH_MAX = 64  # a UUID has 36 characters
SESSION_TOKEN_LENGTH_MIN = 16  # of a random secret; normally a UUID
REASON_LENGTH_MAX = 4096
TRACE_CONTEXT_LENGTH_MAX = 256  # a traceparent has 55
ADDRESS_LENGTH_MAX = 261  # a DNS name of 255, a colon, a port
# A buffer holds at most a slice per partition of an agent; 100,000 slices keep a request below 20 MB.
SLICES_MAX = 100_000
OBJECT_KEY_LENGTH_MAX = 1024  # S3's
# A page of an object listing has 1,000 keys; a request takes ten pages.
OBJECT_KEYS_MAX = 10_000
AGENTS_MAX = 10_000  # of a cluster, named in a single call
GRANTS_ASKED_MAX = 10_000  # ranges per request, some 30 bytes each; an agent that wants more requests all
DELETION_GRACE_MS_MAX = 10 * 366 * 24 * 3_600_000  # ten years: longer is a mistake in the unit
MEMBER_ID_LENGTH_MAX = 300  # a client id, a hyphen, a UUID
GROUP_TOPICS_MAX = 1_000
OWNED_MAX = 100_000  # partitions of a member
EPOCHS_MAX = 1_000  # of a partition, declared lost at once; few are unsettled at a time
OPERATOR_REASON_LENGTH_MAX = 500  # a sentence or two; the event keeps it for good
# Upper limit of the segmenters' settings handover_retry_max_ms and handover_refused_retry_ms: if a release were
# refused, the buffer's trouble would go unreported.
RETRY_AFTER_MS_MAX = 3_600_000


def hex_id(field: str, value: bytes) -> str:
    """Returns the 32 hex characters of a 16-byte id. Raises InvalidArgument."""
    if len(value) != TOPIC_ID_BYTES:
        raise InvalidArgument(
            f"{field} must have {TOPIC_ID_BYTES} bytes, got {len(value)}",
            field=field,
            value=len(value),
            limit=TOPIC_ID_BYTES,
        )
    return value.hex()


def check_uuid(field: str, value: str) -> str:
    """Returns `value` in the canonical form of a UUID. Raises InvalidArgument."""
    try:
        return str(uuid.UUID(value))
    except ValueError as error:
        raise InvalidArgument(f"{field} must be a UUID, got {value[:100]!r}", field=field, value=value[:100]) from error


def agents_reached(items: Sequence[pb.AgentReach]) -> dict[str, bool]:
    """Returns True by agent id if the worker reached the agent, else False. Raises InvalidArgument."""
    check_number("number of agents", len(items), 0, AGENTS_MAX)
    for item in items:
        check_text("agent_id", item.agent_id, NAME_LENGTH_MAX)
    return {item.agent_id: item.reached for item in items}


def session_id_of(token: str) -> str:
    """Returns the id of the session with the secret `token`: 122 bits of a digest, in the form of a UUID.

    Only the holder of the session knows the token. All stored and reported data, events and backups included, has the
    id, which gives no access.
    """
    return str(uuid.UUID(bytes=hashlib.sha256(token.encode()).digest()[:16], version=4))


def session_token(value: str) -> str:
    """Returns the token after a check of its length. The error does not contain the token: errors are logged. Raises
    InvalidArgument."""
    if not SESSION_TOKEN_LENGTH_MIN <= len(value) <= ID_LENGTH_MAX or "\0" in value:
        raise InvalidArgument(
            f"session_token must have {SESSION_TOKEN_LENGTH_MIN} to {ID_LENGTH_MAX} characters, got {len(value)}",
            field="session_token",
            value=f"{len(value)} characters",
            limit=ID_LENGTH_MAX,
        )
    return value


def object_keys(keys: Sequence[str], least: int = 0, most: int = OBJECT_KEYS_MAX) -> list[str]:
    """Returns the keys of objects that may hold segments, each once, in order. Raises InvalidArgument."""
    check_number("number of object_keys", len(keys), least, most)
    for key in keys:
        check_segment_key("object_keys", key)
    return list(dict.fromkeys(keys))


def any_object_keys(keys: Sequence[str]) -> list[str]:
    """Returns keys that are only looked up or removed: an older version may have recorded any text. Raises
    InvalidArgument."""
    check_number("number of object_keys", len(keys), 0, OBJECT_KEYS_MAX)
    for key in keys:
        check_text("object_keys", key, OBJECT_KEY_LENGTH_MAX)
    return list(keys)


def deletion_grace(grace_ms: int, confirm_ms: int) -> DeletionGrace:
    check_number("grace_ms", grace_ms, 0, DELETION_GRACE_MS_MAX)
    check_number("confirm_ms", confirm_ms, 0, DELETION_GRACE_MS_MAX)
    return DeletionGrace(grace_ms, confirm_ms)


def object_deletion(item: JudgedObject) -> pb.ObjectDeletion:
    state = item.state
    return pb.ObjectDeletion(
        object_key=state.object_key,
        verdict=pb.DeletionVerdict.ValueType(item.verdict),
        noticed_ms=state.deletion.noticed_ms if state.deletion is not None else 0,
        declared_ms=state.intent.declared_ms if state.intent is not None else 0,
        worker_id=state.intent.worker_id if state.intent is not None else "",
    )


# The state of one producer has some 100 bytes.
FENCE_STATE_BYTES_MAX = 1024


def check_count(field: str, items: Iterable[object], most: int) -> None:
    check_number(f"number of {field}", sum(1 for _ in items), 0, most)


def check_span(base_offset: int, end_offset: int) -> None:
    check_number("base_offset", base_offset, 0, INT64_MAX)
    check_number("end_offset", end_offset, base_offset + 1, INT64_MAX)


# ---- requests


def range_key(item: pb.RangeKey | pb.WalEnd | pb.RangeUse | pb.BufferSlice | pb.LostSpan) -> RangeRowKey:
    return (hex_id("topic_id", item.topic_id), item.partition, item.epoch)


def wal_ends(items: Iterable[pb.WalEnd], *, unknown: bool = False, torn: bool = False) -> WalEnds:
    ends, snapshots, firsts, topics = {}, {}, {}, {}
    for item in items:
        check_number("end_offset", item.end_offset, 0, INT64_MAX)
        check_number("producer_snapshot bytes", len(item.producer_snapshot), 0, SNAPSHOT_BYTES_MAX)
        key = range_key(item)
        ends[key] = item.end_offset
        if item.topic:
            check_topic(item.topic)
            topics[key[0]] = item.topic
        if item.HasField("first_offset"):
            check_number("first_offset", item.first_offset, 0, item.end_offset)
            firsts[key] = item.first_offset
        if item.producer_snapshot:
            snapshots[key] = item.producer_snapshot
    return WalEnds(ends=ends, snapshots=snapshots, unknown=unknown, torn=torn, firsts=firsts, topics=topics)


def asked_fence(request: pb.RegisterFenceRequest) -> AskedFence:
    check_number("producer_id", request.producer_id, 1, INT64_MAX)
    check_number("producer_epoch", request.producer_epoch, 1, UINT32_MAX)
    check_number("epoch", request.epoch, 1, INT64_MAX)
    check_number("state bytes", len(request.state), 0, FENCE_STATE_BYTES_MAX)
    return AskedFence(
        topic_id=hex_id("topic_id", request.topic_id),
        partition=request.partition,
        epoch=request.epoch,
        producer_id=request.producer_id,
        producer_epoch=request.producer_epoch,
        known_epoch=request.known_epoch,
        state=request.state,
    )


def registered_fence(done: RegisteredFence) -> pb.RegisterFenceResponse:
    waits_for = done.older.waits_for
    return pb.RegisterFenceResponse(
        known_epoch=done.row.known_epoch,
        state=done.row.state,
        older=[_range_producers(row, state) for row, state in done.older.ends],
        next_epoch=done.older.next_epoch,
        waits_for=None if waits_for is None else offset_range(waits_for),
    )


def _range_producers(row: t.RangeRow, state: bytes) -> pb.RangeProducers:
    # Of a lost range what is registered counts, though it may have been settled higher before.
    end_offset = row.registered_end if row.status == t.LOST or row.end_offset is None else row.end_offset
    return pb.RangeProducers(start_offset=row.start_offset, end_offset=end_offset, producer_snapshot=state)


def slice_of(item: pb.BufferSlice) -> Slice:
    check_span(item.base_offset, item.end_offset)
    check_number("record_count", item.record_count, 1, item.end_offset - item.base_offset)
    check_number("size_bytes", item.size_bytes, 0, INT64_MAX)
    check_number("producer_snapshot bytes", len(item.producer_snapshot), 0, SNAPSHOT_BYTES_MAX)
    return Slice(
        topic_id=hex_id("topic_id", item.topic_id),
        topic=item.topic,
        partition=item.partition,
        epoch=item.epoch,
        base_offset=item.base_offset,
        end_offset=item.end_offset,
        record_count=item.record_count,
        size_bytes=item.size_bytes,
    )


def segment_of(item: types_pb2.SegmentRef) -> Segment:
    check_span(item.base_offset, item.end_offset)
    check_number("record_count", item.record_count, 1, item.end_offset - item.base_offset)
    check_segment_key("object_key", item.object_key)
    for field in ("object_at", "raw_bytes"):
        check_number(field, getattr(item, field), 0, INT64_MAX)
    check_number("size_bytes", item.size_bytes, 1, INT64_MAX)
    hex_id("topic_id", item.topic_id)
    segment = next(segments_from_proto([item]))
    # Only the coordinator decides that a segment is lost; a worker cannot declare it with a registration.
    return replace(segment, segment_id=check_uuid("segment_id", item.segment_id), lost_reason="")


def lost_segment(row: t.SegmentRow) -> pb.LostSpan:
    return pb.LostSpan(
        topic_id=uuid.UUID(row.topic_id).bytes,
        partition=row.partition,
        epoch=row.epoch,
        base_offset=row.base_offset,
        end_offset=row.end_offset,
        reason=row.lost_reason,
    )


def lost_span(item: pb.LostSpan) -> t.LostSpanRow:
    check_span(item.base_offset, item.end_offset)
    check_text("reason", item.reason, REASON_LENGTH_MAX)
    topic_id, partition, epoch = range_key(item)
    return t.LostSpanRow(
        topic_id=topic_id,
        partition=partition,
        epoch=epoch,
        base_offset=item.base_offset,
        end_offset=item.end_offset,
        reason=item.reason,
    )


def check_group(name: str) -> None:
    """Checks the name of a group that the call may create. Raises InvalidArgument."""
    check_name("group", name, NAME_LENGTH_MAX)


def check_known_group(name: str) -> None:
    """Checks the name of an existing group: names that only older versions accepted can still be described and deleted.
    Raises InvalidArgument."""
    check_text("group", name, NAME_LENGTH_MAX)


def commit_of(item: pb.OffsetCommit) -> Commit:
    check_number("offset", item.offset, 0, INT64_MAX)
    check_text("metadata", item.metadata, METADATA_LENGTH_MAX, empty=True)
    topic_id = hex_id("topic_id", item.topic_id) if item.topic_id else ""
    return Commit(
        topic=item.topic, partition=item.partition, next_offset=item.offset, metadata=item.metadata, topic_id=topic_id
    )


# ---- responses


def alter_topic(request: pb.AlterTopicRequest) -> AlterTopic:
    """Returns the requested alteration. Raises InvalidArgument for a setting without its value."""
    check_count("unset", request.unset, len(OPTIONAL_LIMITS))
    settings: dict[str, int | None] = {
        name: getattr(request, name)
        for name in OPTIONAL_LIMITS
        if request.HasField(name)  # type: ignore[arg-type]
    }
    for name in request.unset:
        if name in settings:
            raise InvalidArgument(f"{name} is to be set and unset at once", field="unset", value=name)
    return AlterTopic(
        topic=request.topic,
        partitions=request.partitions if request.HasField("partitions") else None,
        min_acks=request.min_acks or None,
        settings=settings | dict.fromkeys(request.unset),
    )


def sql_table_info(row: t.SqlTableRow) -> pb.SqlTableInfo:
    """Returns the message of a declared table."""
    return pb.SqlTableInfo(
        table_id=row.table_id, table=row.table_name, definition=row.definition, created_ms=row.created_ms
    )


def sql_job_info(view: JobView) -> pb.SqlJobInfo:
    """Returns the message of a job."""
    row, lease = view.row, view.lease
    progress = pb.SqlJobProgress(
        lag_records=lease.lag_records, watermark_us=lease.watermark_us, state_bytes=lease.state_bytes
    )
    return pb.SqlJobInfo(
        job_id=row.job_id,
        job=row.job,
        kind=row.kind,
        statement=row.statement,
        output_topic=row.output_topic,
        output_topic_id=bytes.fromhex(row.output_topic_id),
        producer_id=row.producer_id,
        state=row.state,
        reason=row.reason,
        created_ms=row.created_ms,
        epoch=lease.epoch,
        worker_id=view.holder.agent_id if view.holder else "",
        worker_address=view.holder.address if view.holder else "",
        journal_number=lease.journal_number,
        checkpoint_number=lease.checkpoint_number,
        progress=progress if lease.reported_ms else None,
        reported_ms=lease.reported_ms,
        definitions=json.loads(row.definitions),
    )


def sql_job_grant(grant: JobGrant) -> pb.SqlJobGrant:
    """Returns the message of a job that a worker took over."""
    entries = [pb.SqlJournalEntry(number=row.number, entry=row.entry, epoch=row.epoch) for row in grant.journal]
    return pb.SqlJobGrant(
        job=sql_job_info(grant.view),
        checkpoint=grant.checkpoint,
        journal=entries,
        ended_epoch=grant.view.lease.ended_epoch,
    )


def sql_job_progress(held: Iterable[pb.SqlJobHold]) -> dict[str, Progress]:
    """Returns what a worker reports of its jobs, by job id."""
    return {
        hold.job_id: Progress(
            lag_records=_checked("lag_records", hold.progress.lag_records),
            watermark_us=hold.progress.watermark_us if hold.progress.HasField("watermark_us") else None,
            state_bytes=_checked("state_bytes", hold.progress.state_bytes),
        )
        for hold in held
        if hold.HasField("progress")
    }


def _checked(field: str, value: int) -> int:
    check_number(field, value, 0, INT64_MAX)
    return value


def topic_info(row: t.TopicRow) -> pb.TopicInfo:
    return pb.TopicInfo(
        topic_id=bytes.fromhex(row.topic_id),
        topic=row.topic,
        partitions=row.partitions,
        retention_ms=row.retention_ms,
        retention_bytes=row.retention_bytes,
        min_acks=types_pb2.Acks.ValueType(row.min_acks),
        unclean_recovery_after_ms=row.unclean_recovery_after_ms,
        created_ms=row.created_ms,
    )


def offset_range(row: t.RangeRow) -> types_pb2.OffsetRange:
    return types_pb2.OffsetRange(
        epoch=row.epoch,
        start_offset=row.start_offset,
        limit_offset=row.limit_offset,
        registered_end=row.registered_end,
        end_offset=row.end_offset,
        status=row.status,
        agent_id=row.agent_id,
        wal_id=bytes.fromhex(row.wal_id),
        # The row keeps the time after the range has ended; readers of the message must not take it for waiting still.
        orphaned_ms=row.orphaned_ms if row.status == t.ORPHANED else 0,
        acknowledged_end=row.acknowledged_end,
    )


def marked_event(mark: t.HistoryMarkRow | None) -> pb.Event | None:
    return None if mark is None else pb.Event(**{name: getattr(mark, name) for name in t.HISTORY_MARKS.columns})


def projection_check(check: ProjectionCheck) -> pb.CheckProjectionsPart:
    return pb.CheckProjectionsPart(
        events_done=check.events_done,
        events_total=check.events_total,
        done=check.done,
        rows=check.rows,
        differing_rows=check.differing_rows,
        differences=[
            pb.ProjectionDifference(table=item.table, found_json=item.found, expected_json=item.expected)
            for item in check.differences
        ],
    )


def segment_ref(row: t.SegmentRow, topic: str) -> types_pb2.SegmentRef:
    values = {name: getattr(row, name) for name in t.SEGMENTS.columns if name != "topic_id"}
    return types_pb2.SegmentRef(topic_id=bytes.fromhex(row.topic_id), topic=topic, **values)


def range_grant(grant: Grant) -> pb.RangeGrant:
    row, topic = grant.range, grant.topic
    return pb.RangeGrant(
        topic_id=bytes.fromhex(row.topic_id),
        topic=topic.topic,
        partition=row.partition,
        epoch=row.epoch,
        start_offset=row.start_offset,
        limit_offset=row.limit_offset,
        registered_end=row.registered_end,
        end_offset=row.end_offset,
        min_acks=types_pb2.Acks.ValueType(topic.min_acks),
        producer_snapshot=grant.producer_snapshot,
        status="moving" if row.moving else row.status,
        snapshot_omitted=grant.snapshot_omitted,
        at_once=grant.at_once,
        fences=[
            pb.ProducerFence(producer_id=fence.producer_id, producer_epoch=fence.producer_epoch)
            for fence in grant.fences
        ],
    )


def buffer_slice(row: t.BufferSliceRow, topic: str) -> pb.BufferSlice:
    return pb.BufferSlice(
        topic_id=bytes.fromhex(row.topic_id),
        topic=topic,
        partition=row.partition,
        epoch=row.epoch,
        base_offset=row.base_offset,
        end_offset=row.end_offset,
        record_count=row.record_count,
        size_bytes=row.size_bytes,
    )


def session_info(row: t.SessionRow, expires_in_ms: int, *, log_full: bool = False) -> pb.SessionInfo:
    return pb.SessionInfo(
        agent_id=row.agent_id,
        role=row.role,
        address=row.address,
        session_id=row.session_id,
        expires_in_ms=expires_in_ms,
        started_ms=row.started_ms,
        log_full=log_full,
    )


def committed_offset(topic: str, partition: int, row: t.GroupOffsetRow | None) -> pb.CommittedOffset:
    if row is None:
        return pb.CommittedOffset(topic=topic, partition=partition, offset=-1)
    return pb.CommittedOffset(
        topic=topic,
        partition=partition,
        offset=row.next_offset,
        metadata=row.metadata,
        committed_ms=row.committed_ms,
        topic_id=bytes.fromhex(row.topic_id),
    )


def group_summary(summary: group_admin.Summary) -> pb.GroupSummary:
    return pb.GroupSummary(
        group=summary.group,
        state=summary.state,
        generation=summary.generation,
        members=summary.members,
        committed_partitions=summary.committed_partitions,
    )


def topic_partitions(names: Iterable[str]) -> list[pb.TopicPartition]:
    """Returns the partitions with these "topic:partition" names."""
    pairs = map(split_name, names)
    return [pb.TopicPartition(topic=topic, partition=partition) for topic, partition in pairs]


def group_member(member: group_admin.Member) -> pb.GroupMember:
    return pb.GroupMember(
        member_id=member.row.member_id,
        client_id=member.row.client_id,
        topics=member.topics,
        assigned=topic_partitions(member.assigned),
        owned=topic_partitions(member.owned),
        session_timeout_ms=member.row.session_timeout_ms,
        expires_in_ms=member.expires_in_ms,
    )


def group_partition(position: group_admin.GroupPosition) -> pb.GroupPartition:
    commit = position.offset
    return pb.GroupPartition(
        topic=position.topic,
        partition=position.partition,
        member_id=position.member_id,
        offset=-1 if commit is None else commit.next_offset,
        metadata="" if commit is None else commit.metadata,
        committed_ms=0 if commit is None else commit.committed_ms,
        log_start_offset=position.log_start_offset,
        newest_start_offset=position.newest_start_offset,
        older_records=position.older_records,
        exact=position.exact,
    )


def event(row: t.EventRow) -> pb.Event:
    return pb.Event(
        position=row.position,
        stream_id=row.stream_id,
        version=row.version,
        type=row.type,
        payload_json=row.payload,
        trace_context=row.trace_context,
        created_ms=row.created_ms,
    )
