"""Implements the coordinator's RPCs: checks requests, calls the service, builds responses."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Protocol

from opentelemetry import trace
from shformat.limits import INT64_MAX
from shproto.acks import ACKS_WAL
from shproto.errors import InvalidArgument
from shproto.events import BufferSealed, SessionOpened, TopicCreated
from shproto.limits import GROUP_SESSION_TIMEOUT_MS_MAX, GROUP_SESSION_TIMEOUT_MS_MIN, NAME_LENGTH_MAX
from shproto.v1 import coordinator_pb2 as pb
from shruntime.telemetry import context_of, current_traceparent

from streamhouse_coordinator import messages
from streamhouse_coordinator.core.groups import name_of, split_name
from streamhouse_coordinator.core.names import (
    check_name,
    check_number,
    check_text,
    check_topic,
)
from streamhouse_coordinator.core.sessions import INGEST, ROLES, WalEnds, agent_id_taken
from streamhouse_coordinator.core.sql_jobs import AskedEntry
from streamhouse_coordinator.core.tables import SessionRow
from streamhouse_coordinator.feed import Feed
from streamhouse_coordinator.recovery import after_restore
from streamhouse_coordinator.recovery.histories import Head
from streamhouse_coordinator.service import (
    buffers,
    fences,
    group_admin,
    groups,
    housekeeping,
    objects,
    orphaned_ranges,
    producers,
    pruning,
    reach,
    sessions,
    sql_jobs,
    sql_tables,
    topics,
    views,
)
from streamhouse_coordinator.service.common import Context
from streamhouse_coordinator.settings import GROUP_HEARTBEATS

_tracer = trace.get_tracer("streamhouse.coordinator")

# Epoch of a producer without a name, whose id nobody takes over.
FIRST_PRODUCER_EPOCH = 0
METADATA_TOPICS_MAX = 10_000
# Jobs of one worker: each takes memory of its own, far more than a worker has by then.
SQL_JOBS_PER_CALL_MAX = 10_000


class SessionProbe(Protocol):
    """Looks for the processes that hold sessions (probe.Probe)."""

    def follower_gone(self, session_id: str) -> None:
        """Reports that the event stream of the session broke."""

    async def holds(self, session: SessionRow) -> bool:
        """Returns True if a process answers for the session."""


class CoordinatorApi:
    """Implements shproto.services.CoordinatorApi. Calls of producers, consumers and operators use `_clients`, a store
    with a limited share of the database; calls of agents, segmenters and query services use `_context`."""

    def __init__(self, context: Context, feed: Feed, holders: SessionProbe) -> None:
        self._context = context
        self._clients = replace(context, store=context.store.for_clients())
        self._settings = context.settings
        self._feed = feed
        self._holders = holders

    # ---- topics

    async def create_topic(self, request: pb.CreateTopicRequest) -> pb.TopicInfo:
        command = TopicCreated(
            topic_id="",
            topic=request.topic,
            partitions=request.partitions,
            retention_ms=request.retention_ms if request.HasField("retention_ms") else None,
            retention_bytes=request.retention_bytes if request.HasField("retention_bytes") else None,
            min_acks=request.min_acks or ACKS_WAL,
            unclean_recovery_after_ms=(
                request.unclean_recovery_after_ms if request.HasField("unclean_recovery_after_ms") else None
            ),
            created_ms=0,
        )
        row = await topics.create_topic(self._clients, command)
        # After the transaction of the topic: each group has a lock of its own, and there may be thousands.
        await groups.topic_changed(self._clients, row.topic)
        return messages.topic_info(row)

    async def alter_topic(self, request: pb.AlterTopicRequest) -> pb.TopicInfo:
        row = await topics.alter_topic(self._clients, messages.alter_topic(request))
        await groups.topic_changed(self._clients, row.topic)
        return messages.topic_info(row)

    async def delete_topic(self, request: pb.DeleteTopicRequest) -> pb.DeleteTopicResponse:
        topic_id = await topics.delete_topic(self._clients, request.topic)
        await groups.topic_changed(self._clients, request.topic)
        return pb.DeleteTopicResponse(topic_id=bytes.fromhex(topic_id))

    async def create_sql_table(self, request: pb.CreateSqlTableRequest) -> pb.SqlTableInfo:
        row = await sql_tables.create_sql_table(self._clients, request.table, request.definition)
        return messages.sql_table_info(row)

    async def drop_sql_table(self, request: pb.DropSqlTableRequest) -> pb.DropSqlTableResponse:
        return pb.DropSqlTableResponse(table_id=await sql_tables.drop_sql_table(self._clients, request.table))

    async def create_sql_job(self, request: pb.CreateSqlJobRequest) -> pb.SqlJobInfo:
        view = await sql_jobs.create_sql_job(
            self._clients,
            request.job,
            request.kind,
            request.statement,
            request.output_topic,
            tuple(request.definitions),
        )
        return messages.sql_job_info(view)

    async def list_sql_jobs(self, request: pb.ListSqlJobsRequest) -> pb.ListSqlJobsResponse:
        views = await sql_jobs.list_sql_jobs(self._clients, request.job)
        return pb.ListSqlJobsResponse(jobs=[messages.sql_job_info(view) for view in views])

    async def alter_sql_job(self, request: pb.AlterSqlJobRequest) -> pb.SqlJobInfo:
        return messages.sql_job_info(await sql_jobs.alter_sql_job(self._clients, request.job, request.state))

    async def drop_sql_job(self, request: pb.DropSqlJobRequest) -> pb.DropSqlJobResponse:
        return pb.DropSqlJobResponse(job_id=await sql_jobs.drop_sql_job(self._clients, request.job))

    async def claim_sql_jobs(self, request: pb.ClaimSqlJobsRequest) -> pb.ClaimSqlJobsResponse:
        for field, jobs in (("held", request.held), ("released", request.released), ("ended", request.ended)):
            messages.check_count(field, jobs, SQL_JOBS_PER_CALL_MAX)
        claimed = await sql_jobs.claim_sql_jobs(
            self._context,
            messages.session_id_of(request.session_token),
            {hold.job_id: hold.epoch for hold in request.held},
            messages.sql_job_progress(request.held),
            {hold.job_id: hold.epoch for hold in request.released},
            {hold.job_id: hold.epoch for hold in request.ended},
            request.is_leaving,
        )
        return pb.ClaimSqlJobsResponse(
            granted=[messages.sql_job_grant(grant) for grant in claimed.granted],
            stop=[pb.SqlJobStop(job_id=job_id, epoch=epoch, why=why) for job_id, epoch, why in claimed.stop],
        )

    async def append_sql_journal(self, request: pb.AppendSqlJournalRequest) -> pb.AppendSqlJournalResponse:
        messages.check_count("entries", request.entries, SQL_JOBS_PER_CALL_MAX)
        asked = [
            AskedEntry(job_id=item.job_id, epoch=item.epoch, number=item.entry.number, entry=item.entry.entry)
            for item in request.entries
        ]
        session_id = messages.session_id_of(request.session_token)
        refused = await sql_jobs.append_sql_journal(self._context, session_id, asked)
        return pb.AppendSqlJournalResponse(
            refused=[pb.SqlJobRefusal(job_id=job_id, error=error.to_detail()) for job_id, error in refused.items()]
        )

    async def store_sql_checkpoint(self, request: pb.StoreSqlCheckpointRequest) -> pb.StoreSqlCheckpointResponse:
        await sql_jobs.store_sql_checkpoint(
            self._context,
            messages.session_id_of(request.session_token),
            request.job_id,
            request.epoch,
            request.number,
            request.checkpoint,
        )
        return pb.StoreSqlCheckpointResponse()

    async def fail_sql_job(self, request: pb.FailSqlJobRequest) -> pb.FailSqlJobResponse:
        session_id = messages.session_id_of(request.session_token)
        await sql_jobs.fail_sql_job(self._context, session_id, request.job_id, request.epoch, request.reason)
        return pb.FailSqlJobResponse()

    async def delete_records(self, request: pb.DeleteRecordsRequest) -> pb.DeleteRecordsResponse:
        log_start_offset, segments, size_bytes = await housekeeping.delete_records(
            self._clients, request.topic, request.partition, request.before_offset
        )
        return pb.DeleteRecordsResponse(
            log_start_offset=log_start_offset, segments_removed=segments, bytes_removed=size_bytes
        )

    async def list_topics(self, request: pb.ListTopicsRequest) -> pb.ListTopicsResponse:
        rows = await views.list_topics(self._clients)
        return pb.ListTopicsResponse(topics=[messages.topic_info(row) for row in rows])

    async def describe_topic(self, request: pb.DescribeTopicRequest) -> pb.DescribeTopicResponse:
        return await views.describe_topic(self._clients, request.topic)

    async def get_metadata(self, request: pb.GetMetadataRequest) -> pb.GetMetadataResponse:
        messages.check_count("topics", request.topics, METADATA_TOPICS_MAX)
        return await views.get_metadata(self._clients, list(request.topics))

    async def init_producer(self, request: pb.InitProducerRequest) -> pb.InitProducerResponse:
        if request.name:
            taken = await producers.init_producer(self._clients, request.name)
            return pb.InitProducerResponse(producer_id=taken.producer_id, producer_epoch=taken.producer_epoch)
        producer_id = await self._clients.store.next_producer_id()
        return pb.InitProducerResponse(producer_id=producer_id, producer_epoch=FIRST_PRODUCER_EPOCH)

    async def delete_producer(self, request: pb.DeleteProducerRequest) -> pb.DeleteProducerResponse:
        return pb.DeleteProducerResponse(producer_id=await producers.delete_producer(self._clients, request.name))

    async def get_status(self, request: pb.GetStatusRequest) -> pb.GetStatusResponse:
        return await views.get_status(self._clients)

    async def get_head(self, request: pb.GetHeadRequest) -> pb.GetHeadResponse:
        event = None
        if request.event_position:
            event = await pruning.marked(self._context, request.event_position)
        head = await self._context.store.head()
        return pb.GetHeadResponse(
            events_position=head.position,
            history_id=head.history_id,
            missing_position=head.missing_position,
            pruned_position=head.pruned_position,
            event=messages.marked_event(event),
        )

    async def check_projections(self, request: pb.CheckProjectionsRequest) -> AsyncIterator[pb.CheckProjectionsPart]:
        async with contextlib.aclosing(self._clients.store.check_projections()) as parts:  # type: ignore[type-var]
            async for part in parts:
                yield messages.projection_check(part)

    async def mark_history(self, request: pb.MarkHistoryRequest) -> pb.MarkHistoryResponse:
        return pb.MarkHistoryResponse(event=messages.marked_event(await pruning.mark(self._clients)))

    # ---- sessions and leases

    async def open_session(self, request: pb.OpenSessionRequest) -> pb.OpenSessionResponse:
        check_name("agent_id", request.agent_id, NAME_LENGTH_MAX)
        check_name("address", request.address, messages.ADDRESS_LENGTH_MAX, empty=True)
        token = messages.session_token(request.session_token) if request.session_token else self._context.new_id()
        if request.role not in ROLES:
            raise InvalidArgument(
                f"role must be one of {', '.join(ROLES)}, got {request.role[:100]!r}",
                field="role",
                value=request.role[:100],
            )
        ends = messages.wal_ends(request.wal_ends, unknown=request.ends_unknown, torn=request.torn)
        if request.role != INGEST and (request.wal_id or ends != WalEnds()):
            raise InvalidArgument(
                "only ingest agents have a write-ahead log", field="wal_id", value=request.wal_id.hex()
            )
        wal_id = messages.hex_id("wal_id", request.wal_id) if request.role == INGEST else ""
        event = SessionOpened(
            session_id=messages.session_id_of(token),
            agent_id=request.agent_id,
            role=request.role,
            address=request.address,
            wal_id=wal_id,
            started_ms=0,
        )
        check_name("history_id", request.history_id, messages.ID_LENGTH_MAX, empty=True)
        seen = Head(history_id=request.history_id, position=request.seen_position)
        # Probed outside the transaction: a probe may take probe_timeout_ms, and the cluster lock is not held for that
        # long.
        for rival in await sessions.rivals(self._context, event):
            if await self._holders.holds(rival):
                raise agent_id_taken(rival)
        opened = await sessions.open_session(self._context, event, ends, seen)
        for topic in opened.recovered_topics:
            await groups.topic_changed(self._context, topic)
        return pb.OpenSessionResponse(
            session_token=token,
            session_id=opened.session_id,
            ttl_ms=self._settings.session_ttl_ms,
            heartbeat_interval_ms=self._settings.heartbeat_interval_ms,
            resumed=[messages.range_grant(grant) for grant in opened.resumed],
            feed_position=opened.feed_position,
            history_id=opened.history.history_id,
            producer_ids_from=opened.history.producer_ids_from,
        )

    async def heartbeat(self, request: pb.HeartbeatRequest) -> pb.HeartbeatResponse:
        low = {messages.range_key(item): item.next_offset for item in request.low_ranges}
        session_id = messages.session_id_of(request.session_token)
        log_full = request.log_full if request.HasField("log_full") else None
        reached = messages.agents_reached(request.agents)
        version, extended = await sessions.heartbeat(self._context, session_id, low, log_full)
        # After the lease is renewed: a failing report must not cost the worker its session.
        to_check = await reach.report(self._context, session_id, reached) if request.checks_agents else []
        return pb.HeartbeatResponse(
            ttl_ms=self._settings.session_ttl_ms,
            grants_version=version,
            extended=[messages.range_grant(grant) for grant in extended],
            check=[pb.AgentAddress(agent_id=row.agent_id, address=row.address) for row in to_check],
        )

    async def get_grants(self, request: pb.GetGrantsRequest) -> pb.GetGrantsResponse:
        check_number("number of ranges in only", len(request.only), 0, messages.GRANTS_ASKED_MAX)
        only = {messages.range_key(item) for item in request.only}
        version, grants, position = await sessions.get_grants(
            self._context, messages.session_id_of(request.session_token), only
        )
        return pb.GetGrantsResponse(
            grants=[messages.range_grant(grant) for grant in grants], grants_version=version, position=position
        )

    async def settle_ranges(self, request: pb.SettleRangesRequest) -> pb.SettleRangesResponse:
        await sessions.settle_ranges(
            self._context, messages.session_id_of(request.session_token), messages.wal_ends(request.ends)
        )
        return pb.SettleRangesResponse()

    async def register_fence(self, request: pb.RegisterFenceRequest) -> pb.RegisterFenceResponse:
        asked = messages.asked_fence(request)
        done = await fences.register_fence(self._context, messages.session_id_of(request.session_token), asked)
        return messages.registered_fence(done)

    async def close_session(self, request: pb.CloseSessionRequest) -> pb.CloseSessionResponse:
        await sessions.end_session(
            self._context, messages.session_id_of(request.session_token), "closed", messages.wal_ends(request.ends)
        )
        return pb.CloseSessionResponse()

    # ---- sealed buffers and segments

    async def announce_buffer(self, request: pb.AnnounceBufferRequest) -> pb.AnnounceBufferResponse:
        buffer_id = messages.check_uuid("buffer_id", request.buffer_id)
        check_number("number of slices", len(request.slices), 1, messages.SLICES_MAX)
        check_name("trace_context", request.trace_context, messages.TRACE_CONTEXT_LENGTH_MAX, empty=True)
        slices = tuple(messages.slice_of(item) for item in request.slices)
        sealed = BufferSealed(
            buffer_id=buffer_id,
            session_id=messages.session_id_of(request.session_token),
            agent_id="",
            wal_id="",
            slices=slices,
        )
        snapshots = {messages.range_key(item): item.producer_snapshot for item in request.slices}
        await buffers.announce(self._context, sealed, snapshots, request.trace_context)
        return pb.AnnounceBufferResponse()

    async def claim_buffer(self, request: pb.ClaimBufferRequest) -> pb.ClaimBufferResponse:
        check_name("worker_id", request.worker_id, NAME_LENGTH_MAX)
        check_number("claim_ttl_ms", request.claim_ttl_ms, 1, self._settings.claim_ttl_ms_max)
        messages.check_count("except_agents", request.except_agents, messages.AGENTS_MAX)
        claimed = await buffers.claim(
            self._context, request.worker_id, request.claim_ttl_ms, frozenset(request.except_agents)
        )
        if claimed is None:
            return pb.ClaimBufferResponse(found=False)
        return pb.ClaimBufferResponse(
            found=True,
            buffer_id=claimed.buffer.buffer_id,
            claim_id=claimed.claim.claim_id,
            agent_id=claimed.buffer.agent_id,
            address=claimed.address,
            slices=[messages.buffer_slice(item, claimed.topics.get(item.topic_id, "")) for item in claimed.slices],
            trace_context=claimed.claim.trace_context,
            attempt=claimed.claim.attempt,
        )

    async def renew_claim(self, request: pb.RenewClaimRequest) -> pb.RenewClaimResponse:
        check_name("claim_id", request.claim_id, messages.ID_LENGTH_MAX)
        check_number("claim_ttl_ms", request.claim_ttl_ms, 1, self._settings.claim_ttl_ms_max)
        await buffers.renew_claim(self._context, request.claim_id, request.claim_ttl_ms)
        return pb.RenewClaimResponse()

    async def release_claim(self, request: pb.ReleaseClaimRequest) -> pb.ReleaseClaimResponse:
        check_name("claim_id", request.claim_id, messages.ID_LENGTH_MAX)
        check_number("retry_after_ms", request.retry_after_ms, 0, messages.RETRY_AFTER_MS_MAX)
        reason = request.reason[: messages.REASON_LENGTH_MAX].replace("\0", "")
        await buffers.release_claim(self._context, request.claim_id, reason, request.retry_after_ms)
        return pb.ReleaseClaimResponse()

    async def declare_uploads(self, request: pb.DeclareUploadsRequest) -> pb.DeclareUploadsResponse:
        check_name("claim_id", request.claim_id, messages.ID_LENGTH_MAX)
        keys = messages.object_keys(request.object_keys, least=1, most=messages.SLICES_MAX)
        await objects.declare_uploads(self._context, request.claim_id, keys)
        return pb.DeclareUploadsResponse()

    async def register_segments(self, request: pb.RegisterSegmentsRequest) -> pb.RegisterSegmentsResponse:
        messages.check_count("segments", request.segments, messages.SLICES_MAX)
        check_name("trace_context", request.trace_context, messages.TRACE_CONTEXT_LENGTH_MAX, empty=True)
        check_name("buffer_id", request.buffer_id, messages.ID_LENGTH_MAX, empty=True)
        segments = [messages.segment_of(item) for item in request.segments]
        with _tracer.start_as_current_span("coordinator.register", context_of(request.trace_context)) as span:
            span.set_attribute("segments", len(segments))
            trace_context = current_traceparent() or request.trace_context
            results = await buffers.register(self._context, request.buffer_id, segments, trace_context)
        return pb.RegisterSegmentsResponse(results=[pb.RegistrationResult.ValueType(result) for result in results])

    async def report_lost(self, request: pb.ReportLostRequest) -> pb.ReportLostResponse:
        messages.check_count("spans", request.spans, messages.SLICES_MAX)
        spans = [messages.lost_span(item) for item in request.spans]
        await buffers.report_lost(self._context, messages.session_id_of(request.session_token), spans)
        return pb.ReportLostResponse()

    # ---- housekeeping

    async def claim_compaction(self, request: pb.ClaimCompactionRequest) -> pb.ClaimCompactionResponse:
        check_name("worker_id", request.worker_id, NAME_LENGTH_MAX)
        check_number("claim_ttl_ms", request.claim_ttl_ms, 1, self._settings.claim_ttl_ms_max)
        check_number("small_bytes_max", request.small_bytes_max, 1, INT64_MAX)
        check_number("target_bytes", request.target_bytes, 1, INT64_MAX)
        # A longer run would never be found: the segments of a partition are read in pages of this size.
        check_number("segments_min", request.segments_min, 2, housekeeping.COMPACTION_SEGMENTS)
        claim = await housekeeping.claim_compaction(
            self._context,
            request.worker_id,
            request.claim_ttl_ms,
            request.small_bytes_max,
            request.target_bytes,
            request.segments_min,
        )
        if claim is None:
            return pb.ClaimCompactionResponse(found=False)
        segments = [messages.segment_ref(row, claim.topic) for row in claim.segments]
        return pb.ClaimCompactionResponse(found=True, claim_id=claim.claim_id, segments=segments)

    async def register_compaction(self, request: pb.RegisterCompactionRequest) -> pb.RegisterCompactionResponse:
        check_name("claim_id", request.claim_id, messages.ID_LENGTH_MAX, empty=True)
        check_number("number of replaced_segment_ids", len(request.replaced_segment_ids), 1, messages.SLICES_MAX)
        result = await housekeeping.register_compaction(
            self._context, request.claim_id, list(request.replaced_segment_ids), messages.segment_of(request.segment)
        )
        return pb.RegisterCompactionResponse(result=pb.RegistrationResult.ValueType(result))

    async def apply_retention(self, request: pb.ApplyRetentionRequest) -> pb.ApplyRetentionResponse:
        segments, size_bytes = await housekeeping.apply_retention(self._context)
        return pb.ApplyRetentionResponse(segments_removed=segments, bytes_removed=size_bytes)

    async def filter_unreferenced(self, request: pb.FilterUnreferencedRequest) -> pb.FilterUnreferencedResponse:
        keys = await housekeeping.filter_unreferenced(self._context, messages.any_object_keys(request.object_keys))
        return pb.FilterUnreferencedResponse(object_keys=keys)

    async def begin_deletion(self, request: pb.BeginDeletionRequest) -> pb.BeginDeletionResponse:
        keys = messages.object_keys(request.object_keys)
        grace = messages.deletion_grace(request.grace_ms, request.confirm_ms)
        now_ms, judged = await objects.begin_deletion(self._context, keys, grace, request.dry_run)
        return pb.BeginDeletionResponse(now_ms=now_ms, objects=[messages.object_deletion(item) for item in judged])

    async def finish_deletion(self, request: pb.FinishDeletionRequest) -> pb.FinishDeletionResponse:
        await objects.finish_deletion(self._context, messages.any_object_keys(request.object_keys))
        return pb.FinishDeletionResponse()

    async def list_deletions(self, request: pb.ListDeletionsRequest) -> pb.ListDeletionsResponse:
        check_number("limit", request.limit, 1, messages.OBJECT_KEYS_MAX)
        grace = messages.deletion_grace(request.grace_ms, request.confirm_ms)
        keys = await objects.list_deletions(self._context, grace, request.limit)
        return pb.ListDeletionsResponse(object_keys=keys)

    # ---- consumer groups

    async def join_group(self, request: pb.JoinGroupRequest) -> pb.GroupAssignment:
        messages.check_group(request.group)
        check_name("member_id", request.member_id, messages.MEMBER_ID_LENGTH_MAX, empty=True)
        check_name("client_id", request.client_id, NAME_LENGTH_MAX, empty=True)
        check_number("number of topics", len(request.topics), 0, messages.GROUP_TOPICS_MAX)
        for topic in request.topics:
            check_topic(topic)
        check_number("number of owned partitions", len(request.owned), 0, messages.OWNED_MAX)
        if request.session_timeout_ms:
            least, most = GROUP_SESSION_TIMEOUT_MS_MIN, GROUP_SESSION_TIMEOUT_MS_MAX
            check_number("session_timeout_ms", request.session_timeout_ms, least, most)
        assignment = await groups.join(
            self._clients,
            request.group,
            request.member_id,
            list(request.topics),
            request.client_id,
            request.session_timeout_ms,
            frozenset(name_of(item.topic, item.partition) for item in request.owned),
        )
        return self._assignment(assignment)

    async def heartbeat_group(self, request: pb.HeartbeatGroupRequest) -> pb.GroupAssignment:
        messages.check_known_group(request.group)
        check_name("member_id", request.member_id, messages.MEMBER_ID_LENGTH_MAX)
        check_number("number of owned partitions", len(request.owned), 0, messages.OWNED_MAX)
        owned = frozenset(name_of(item.topic, item.partition) for item in request.owned)
        assignment = await groups.heartbeat(
            self._clients, request.group, request.member_id, request.generation, owned, request.max_wait_ms
        )
        return self._assignment(assignment)

    def _assignment(self, assignment: groups.Assignment) -> pb.GroupAssignment:
        return pb.GroupAssignment(
            member_id=assignment.member_id,
            generation=assignment.generation,
            assigned=messages.topic_partitions(sorted(assignment.assigned, key=split_name)),
            # Two heartbeats may be lost, also with a timeout below the default.
            heartbeat_interval_ms=min(
                self._settings.group_heartbeat_interval_ms, assignment.session_timeout_ms // GROUP_HEARTBEATS
            ),
            session_timeout_ms=assignment.session_timeout_ms,
            pending=assignment.pending,
        )

    async def leave_group(self, request: pb.LeaveGroupRequest) -> pb.LeaveGroupResponse:
        messages.check_known_group(request.group)
        await groups.leave(self._clients, request.group, request.member_id)
        return pb.LeaveGroupResponse()

    async def commit_offsets(self, request: pb.CommitOffsetsRequest) -> pb.CommitOffsetsResponse:
        messages.check_group(request.group)
        check_number("number of offsets", len(request.offsets), 0, messages.OWNED_MAX)
        commits = [messages.commit_of(item) for item in request.offsets]
        await groups.commit(self._clients, request.group, request.member_id, request.generation, commits)
        return pb.CommitOffsetsResponse()

    async def fetch_offsets(self, request: pb.FetchOffsetsRequest) -> pb.FetchOffsetsResponse:
        messages.check_known_group(request.group)
        check_number("number of partitions", len(request.partitions), 0, messages.OWNED_MAX)
        wanted = [(item.topic, item.partition) for item in request.partitions]
        found = await groups.fetch_offsets(self._clients, request.group, wanted)
        return pb.FetchOffsetsResponse(offsets=[messages.committed_offset(*item) for item in found])

    # ---- for operators

    async def list_groups(self, request: pb.ListGroupsRequest) -> pb.ListGroupsResponse:
        found = await group_admin.list_groups(self._clients)
        return pb.ListGroupsResponse(groups=[messages.group_summary(item) for item in found])

    async def describe_group(self, request: pb.DescribeGroupRequest) -> pb.DescribeGroupResponse:
        messages.check_known_group(request.group)
        described = await group_admin.describe_group(self._clients, request.group)
        return pb.DescribeGroupResponse(
            summary=messages.group_summary(described.summary),
            members=[messages.group_member(item) for item in described.members],
            partitions=[messages.group_partition(item) for item in described.positions],
        )

    async def reset_offsets(self, request: pb.ResetOffsetsRequest) -> pb.ResetOffsetsResponse:
        messages.check_group(request.group)
        check_number("number of offsets", len(request.offsets), 1, messages.OWNED_MAX)
        commits = [messages.commit_of(item) for item in request.offsets]
        await group_admin.reset_offsets(self._clients, request.group, commits)
        return pb.ResetOffsetsResponse()

    async def delete_group(self, request: pb.DeleteGroupRequest) -> pb.DeleteGroupResponse:
        messages.check_known_group(request.group)
        await group_admin.delete_group(self._clients, request.group)
        return pb.DeleteGroupResponse()

    async def declare_lost(self, request: pb.DeclareLostRequest) -> pb.DeclareLostResponse:
        check_number("number of epochs", len(request.epochs), 1, messages.EPOCHS_MAX)
        for epoch in request.epochs:
            check_number("epochs", epoch, 1, INT64_MAX)
        check_text("reason", request.reason, messages.OPERATOR_REASON_LENGTH_MAX, empty=True)
        rows = await orphaned_ranges.declare_lost(
            self._clients, request.topic, request.partition, list(request.epochs), request.reason
        )
        return pb.DeclareLostResponse(ranges=[messages.offset_range(row) for row in rows])

    async def complete_restore(self, request: pb.CompleteRestoreRequest) -> pb.CompleteRestoreResponse:
        check_text("reason", request.reason, messages.OPERATOR_REASON_LENGTH_MAX, empty=True)
        found, agents = await after_restore.complete(
            self._clients, lost=request.lost, dry_run=request.dry_run, reason=request.reason
        )
        unrecovered = [
            pb.UnrecoveredRange(topic=topic, partition=row.partition, range=messages.offset_range(row))
            for topic, row in found
        ]
        return pb.CompleteRestoreResponse(unrecovered_ranges=unrecovered, agents=agents)

    # ---- events

    async def follow_events(self, request: pb.FollowEventsRequest) -> AsyncIterator[pb.Event]:
        check_name("history_id", request.history_id, messages.ID_LENGTH_MAX, empty=True)
        events = self._feed.follow(request.after_position, list(request.types), request.history_id)
        try:
            async with contextlib.aclosing(events):  # type: ignore[type-var]
                async for row in events:
                    yield messages.event(row)
        finally:
            # Also if the stream is cancelled or breaks: a follower that is gone need not wait for its lease to run out.
            if request.session_token:
                self._holders.follower_gone(messages.session_id_of(request.session_token))

    async def get_snapshot(self, request: pb.GetSnapshotRequest) -> AsyncIterator[pb.SnapshotPart]:
        async with contextlib.aclosing(views.get_snapshot(self._context)) as parts:  # type: ignore[type-var]
            async for part in parts:
                yield part
