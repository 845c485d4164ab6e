"""Typed service APIs, generated from proto/ by tools/gen_proto.py: do not edit."""

from collections.abc import AsyncIterator
from typing import Protocol

from shproto.rpc import Caller
from shproto.v1 import coordinator_pb2, ingest_pb2, query_pb2, sql_pb2


class CoordinatorApi(Protocol):
    async def create_topic(self, request: coordinator_pb2.CreateTopicRequest) -> coordinator_pb2.TopicInfo: ...
    async def alter_topic(self, request: coordinator_pb2.AlterTopicRequest) -> coordinator_pb2.TopicInfo: ...
    async def delete_topic(self, request: coordinator_pb2.DeleteTopicRequest) -> coordinator_pb2.DeleteTopicResponse: ...
    async def delete_records(self, request: coordinator_pb2.DeleteRecordsRequest) -> coordinator_pb2.DeleteRecordsResponse: ...
    async def list_topics(self, request: coordinator_pb2.ListTopicsRequest) -> coordinator_pb2.ListTopicsResponse: ...
    async def describe_topic(self, request: coordinator_pb2.DescribeTopicRequest) -> coordinator_pb2.DescribeTopicResponse: ...
    async def get_metadata(self, request: coordinator_pb2.GetMetadataRequest) -> coordinator_pb2.GetMetadataResponse: ...
    async def init_producer(self, request: coordinator_pb2.InitProducerRequest) -> coordinator_pb2.InitProducerResponse: ...
    async def delete_producer(self, request: coordinator_pb2.DeleteProducerRequest) -> coordinator_pb2.DeleteProducerResponse: ...
    async def get_status(self, request: coordinator_pb2.GetStatusRequest) -> coordinator_pb2.GetStatusResponse: ...
    async def get_head(self, request: coordinator_pb2.GetHeadRequest) -> coordinator_pb2.GetHeadResponse: ...
    async def mark_history(self, request: coordinator_pb2.MarkHistoryRequest) -> coordinator_pb2.MarkHistoryResponse: ...
    def check_projections(self, request: coordinator_pb2.CheckProjectionsRequest) -> AsyncIterator[coordinator_pb2.CheckProjectionsPart]: ...
    async def open_session(self, request: coordinator_pb2.OpenSessionRequest) -> coordinator_pb2.OpenSessionResponse: ...
    async def heartbeat(self, request: coordinator_pb2.HeartbeatRequest) -> coordinator_pb2.HeartbeatResponse: ...
    async def get_grants(self, request: coordinator_pb2.GetGrantsRequest) -> coordinator_pb2.GetGrantsResponse: ...
    async def settle_ranges(self, request: coordinator_pb2.SettleRangesRequest) -> coordinator_pb2.SettleRangesResponse: ...
    async def register_fence(self, request: coordinator_pb2.RegisterFenceRequest) -> coordinator_pb2.RegisterFenceResponse: ...
    async def close_session(self, request: coordinator_pb2.CloseSessionRequest) -> coordinator_pb2.CloseSessionResponse: ...
    async def announce_buffer(self, request: coordinator_pb2.AnnounceBufferRequest) -> coordinator_pb2.AnnounceBufferResponse: ...
    async def claim_buffer(self, request: coordinator_pb2.ClaimBufferRequest) -> coordinator_pb2.ClaimBufferResponse: ...
    async def renew_claim(self, request: coordinator_pb2.RenewClaimRequest) -> coordinator_pb2.RenewClaimResponse: ...
    async def release_claim(self, request: coordinator_pb2.ReleaseClaimRequest) -> coordinator_pb2.ReleaseClaimResponse: ...
    async def declare_uploads(self, request: coordinator_pb2.DeclareUploadsRequest) -> coordinator_pb2.DeclareUploadsResponse: ...
    async def register_segments(self, request: coordinator_pb2.RegisterSegmentsRequest) -> coordinator_pb2.RegisterSegmentsResponse: ...
    async def report_lost(self, request: coordinator_pb2.ReportLostRequest) -> coordinator_pb2.ReportLostResponse: ...
    async def claim_compaction(self, request: coordinator_pb2.ClaimCompactionRequest) -> coordinator_pb2.ClaimCompactionResponse: ...
    async def register_compaction(self, request: coordinator_pb2.RegisterCompactionRequest) -> coordinator_pb2.RegisterCompactionResponse: ...
    async def apply_retention(self, request: coordinator_pb2.ApplyRetentionRequest) -> coordinator_pb2.ApplyRetentionResponse: ...
    async def filter_unreferenced(self, request: coordinator_pb2.FilterUnreferencedRequest) -> coordinator_pb2.FilterUnreferencedResponse: ...
    async def begin_deletion(self, request: coordinator_pb2.BeginDeletionRequest) -> coordinator_pb2.BeginDeletionResponse: ...
    async def finish_deletion(self, request: coordinator_pb2.FinishDeletionRequest) -> coordinator_pb2.FinishDeletionResponse: ...
    async def list_deletions(self, request: coordinator_pb2.ListDeletionsRequest) -> coordinator_pb2.ListDeletionsResponse: ...
    def follow_events(self, request: coordinator_pb2.FollowEventsRequest) -> AsyncIterator[coordinator_pb2.Event]: ...
    def get_snapshot(self, request: coordinator_pb2.GetSnapshotRequest) -> AsyncIterator[coordinator_pb2.SnapshotPart]: ...
    async def join_group(self, request: coordinator_pb2.JoinGroupRequest) -> coordinator_pb2.GroupAssignment: ...
    async def heartbeat_group(self, request: coordinator_pb2.HeartbeatGroupRequest) -> coordinator_pb2.GroupAssignment: ...
    async def leave_group(self, request: coordinator_pb2.LeaveGroupRequest) -> coordinator_pb2.LeaveGroupResponse: ...
    async def commit_offsets(self, request: coordinator_pb2.CommitOffsetsRequest) -> coordinator_pb2.CommitOffsetsResponse: ...
    async def fetch_offsets(self, request: coordinator_pb2.FetchOffsetsRequest) -> coordinator_pb2.FetchOffsetsResponse: ...
    async def list_groups(self, request: coordinator_pb2.ListGroupsRequest) -> coordinator_pb2.ListGroupsResponse: ...
    async def describe_group(self, request: coordinator_pb2.DescribeGroupRequest) -> coordinator_pb2.DescribeGroupResponse: ...
    async def reset_offsets(self, request: coordinator_pb2.ResetOffsetsRequest) -> coordinator_pb2.ResetOffsetsResponse: ...
    async def delete_group(self, request: coordinator_pb2.DeleteGroupRequest) -> coordinator_pb2.DeleteGroupResponse: ...
    async def create_sql_table(self, request: coordinator_pb2.CreateSqlTableRequest) -> coordinator_pb2.SqlTableInfo: ...
    async def drop_sql_table(self, request: coordinator_pb2.DropSqlTableRequest) -> coordinator_pb2.DropSqlTableResponse: ...
    async def create_sql_job(self, request: coordinator_pb2.CreateSqlJobRequest) -> coordinator_pb2.SqlJobInfo: ...
    async def list_sql_jobs(self, request: coordinator_pb2.ListSqlJobsRequest) -> coordinator_pb2.ListSqlJobsResponse: ...
    async def alter_sql_job(self, request: coordinator_pb2.AlterSqlJobRequest) -> coordinator_pb2.SqlJobInfo: ...
    async def drop_sql_job(self, request: coordinator_pb2.DropSqlJobRequest) -> coordinator_pb2.DropSqlJobResponse: ...
    async def claim_sql_jobs(self, request: coordinator_pb2.ClaimSqlJobsRequest) -> coordinator_pb2.ClaimSqlJobsResponse: ...
    async def append_sql_journal(self, request: coordinator_pb2.AppendSqlJournalRequest) -> coordinator_pb2.AppendSqlJournalResponse: ...
    async def store_sql_checkpoint(self, request: coordinator_pb2.StoreSqlCheckpointRequest) -> coordinator_pb2.StoreSqlCheckpointResponse: ...
    async def fail_sql_job(self, request: coordinator_pb2.FailSqlJobRequest) -> coordinator_pb2.FailSqlJobResponse: ...
    async def declare_lost(self, request: coordinator_pb2.DeclareLostRequest) -> coordinator_pb2.DeclareLostResponse: ...
    async def complete_restore(self, request: coordinator_pb2.CompleteRestoreRequest) -> coordinator_pb2.CompleteRestoreResponse: ...


class CoordinatorClient:
    def __init__(self, connection: Caller) -> None:
        self._connection = connection

    async def create_topic(self, request: coordinator_pb2.CreateTopicRequest) -> coordinator_pb2.TopicInfo:
        return await self._connection.unary("/streamhouse.v1.Coordinator/CreateTopic", request, coordinator_pb2.TopicInfo)

    async def alter_topic(self, request: coordinator_pb2.AlterTopicRequest) -> coordinator_pb2.TopicInfo:
        return await self._connection.unary("/streamhouse.v1.Coordinator/AlterTopic", request, coordinator_pb2.TopicInfo)

    async def delete_topic(self, request: coordinator_pb2.DeleteTopicRequest) -> coordinator_pb2.DeleteTopicResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/DeleteTopic", request, coordinator_pb2.DeleteTopicResponse)

    async def delete_records(self, request: coordinator_pb2.DeleteRecordsRequest) -> coordinator_pb2.DeleteRecordsResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/DeleteRecords", request, coordinator_pb2.DeleteRecordsResponse)

    async def list_topics(self, request: coordinator_pb2.ListTopicsRequest) -> coordinator_pb2.ListTopicsResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/ListTopics", request, coordinator_pb2.ListTopicsResponse)

    async def describe_topic(self, request: coordinator_pb2.DescribeTopicRequest) -> coordinator_pb2.DescribeTopicResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/DescribeTopic", request, coordinator_pb2.DescribeTopicResponse)

    async def get_metadata(self, request: coordinator_pb2.GetMetadataRequest) -> coordinator_pb2.GetMetadataResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/GetMetadata", request, coordinator_pb2.GetMetadataResponse)

    async def init_producer(self, request: coordinator_pb2.InitProducerRequest) -> coordinator_pb2.InitProducerResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/InitProducer", request, coordinator_pb2.InitProducerResponse)

    async def delete_producer(self, request: coordinator_pb2.DeleteProducerRequest) -> coordinator_pb2.DeleteProducerResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/DeleteProducer", request, coordinator_pb2.DeleteProducerResponse)

    async def get_status(self, request: coordinator_pb2.GetStatusRequest) -> coordinator_pb2.GetStatusResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/GetStatus", request, coordinator_pb2.GetStatusResponse)

    async def get_head(self, request: coordinator_pb2.GetHeadRequest) -> coordinator_pb2.GetHeadResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/GetHead", request, coordinator_pb2.GetHeadResponse)

    async def mark_history(self, request: coordinator_pb2.MarkHistoryRequest) -> coordinator_pb2.MarkHistoryResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/MarkHistory", request, coordinator_pb2.MarkHistoryResponse)

    def check_projections(self, request: coordinator_pb2.CheckProjectionsRequest) -> AsyncIterator[coordinator_pb2.CheckProjectionsPart]:
        return self._connection.unary_stream("/streamhouse.v1.Coordinator/CheckProjections", request, coordinator_pb2.CheckProjectionsPart)

    async def open_session(self, request: coordinator_pb2.OpenSessionRequest) -> coordinator_pb2.OpenSessionResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/OpenSession", request, coordinator_pb2.OpenSessionResponse)

    async def heartbeat(self, request: coordinator_pb2.HeartbeatRequest) -> coordinator_pb2.HeartbeatResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/Heartbeat", request, coordinator_pb2.HeartbeatResponse)

    async def get_grants(self, request: coordinator_pb2.GetGrantsRequest) -> coordinator_pb2.GetGrantsResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/GetGrants", request, coordinator_pb2.GetGrantsResponse)

    async def settle_ranges(self, request: coordinator_pb2.SettleRangesRequest) -> coordinator_pb2.SettleRangesResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/SettleRanges", request, coordinator_pb2.SettleRangesResponse)

    async def register_fence(self, request: coordinator_pb2.RegisterFenceRequest) -> coordinator_pb2.RegisterFenceResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/RegisterFence", request, coordinator_pb2.RegisterFenceResponse)

    async def close_session(self, request: coordinator_pb2.CloseSessionRequest) -> coordinator_pb2.CloseSessionResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/CloseSession", request, coordinator_pb2.CloseSessionResponse)

    async def announce_buffer(self, request: coordinator_pb2.AnnounceBufferRequest) -> coordinator_pb2.AnnounceBufferResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/AnnounceBuffer", request, coordinator_pb2.AnnounceBufferResponse)

    async def claim_buffer(self, request: coordinator_pb2.ClaimBufferRequest) -> coordinator_pb2.ClaimBufferResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/ClaimBuffer", request, coordinator_pb2.ClaimBufferResponse)

    async def renew_claim(self, request: coordinator_pb2.RenewClaimRequest) -> coordinator_pb2.RenewClaimResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/RenewClaim", request, coordinator_pb2.RenewClaimResponse)

    async def release_claim(self, request: coordinator_pb2.ReleaseClaimRequest) -> coordinator_pb2.ReleaseClaimResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/ReleaseClaim", request, coordinator_pb2.ReleaseClaimResponse)

    async def declare_uploads(self, request: coordinator_pb2.DeclareUploadsRequest) -> coordinator_pb2.DeclareUploadsResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/DeclareUploads", request, coordinator_pb2.DeclareUploadsResponse)

    async def register_segments(self, request: coordinator_pb2.RegisterSegmentsRequest) -> coordinator_pb2.RegisterSegmentsResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/RegisterSegments", request, coordinator_pb2.RegisterSegmentsResponse)

    async def report_lost(self, request: coordinator_pb2.ReportLostRequest) -> coordinator_pb2.ReportLostResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/ReportLost", request, coordinator_pb2.ReportLostResponse)

    async def claim_compaction(self, request: coordinator_pb2.ClaimCompactionRequest) -> coordinator_pb2.ClaimCompactionResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/ClaimCompaction", request, coordinator_pb2.ClaimCompactionResponse)

    async def register_compaction(self, request: coordinator_pb2.RegisterCompactionRequest) -> coordinator_pb2.RegisterCompactionResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/RegisterCompaction", request, coordinator_pb2.RegisterCompactionResponse)

    async def apply_retention(self, request: coordinator_pb2.ApplyRetentionRequest) -> coordinator_pb2.ApplyRetentionResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/ApplyRetention", request, coordinator_pb2.ApplyRetentionResponse)

    async def filter_unreferenced(self, request: coordinator_pb2.FilterUnreferencedRequest) -> coordinator_pb2.FilterUnreferencedResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/FilterUnreferenced", request, coordinator_pb2.FilterUnreferencedResponse)

    async def begin_deletion(self, request: coordinator_pb2.BeginDeletionRequest) -> coordinator_pb2.BeginDeletionResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/BeginDeletion", request, coordinator_pb2.BeginDeletionResponse)

    async def finish_deletion(self, request: coordinator_pb2.FinishDeletionRequest) -> coordinator_pb2.FinishDeletionResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/FinishDeletion", request, coordinator_pb2.FinishDeletionResponse)

    async def list_deletions(self, request: coordinator_pb2.ListDeletionsRequest) -> coordinator_pb2.ListDeletionsResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/ListDeletions", request, coordinator_pb2.ListDeletionsResponse)

    def follow_events(self, request: coordinator_pb2.FollowEventsRequest) -> AsyncIterator[coordinator_pb2.Event]:
        return self._connection.unary_stream("/streamhouse.v1.Coordinator/FollowEvents", request, coordinator_pb2.Event)

    def get_snapshot(self, request: coordinator_pb2.GetSnapshotRequest) -> AsyncIterator[coordinator_pb2.SnapshotPart]:
        return self._connection.unary_stream("/streamhouse.v1.Coordinator/GetSnapshot", request, coordinator_pb2.SnapshotPart)

    async def join_group(self, request: coordinator_pb2.JoinGroupRequest) -> coordinator_pb2.GroupAssignment:
        return await self._connection.unary("/streamhouse.v1.Coordinator/JoinGroup", request, coordinator_pb2.GroupAssignment)

    async def heartbeat_group(self, request: coordinator_pb2.HeartbeatGroupRequest) -> coordinator_pb2.GroupAssignment:
        return await self._connection.unary("/streamhouse.v1.Coordinator/HeartbeatGroup", request, coordinator_pb2.GroupAssignment)

    async def leave_group(self, request: coordinator_pb2.LeaveGroupRequest) -> coordinator_pb2.LeaveGroupResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/LeaveGroup", request, coordinator_pb2.LeaveGroupResponse)

    async def commit_offsets(self, request: coordinator_pb2.CommitOffsetsRequest) -> coordinator_pb2.CommitOffsetsResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/CommitOffsets", request, coordinator_pb2.CommitOffsetsResponse)

    async def fetch_offsets(self, request: coordinator_pb2.FetchOffsetsRequest) -> coordinator_pb2.FetchOffsetsResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/FetchOffsets", request, coordinator_pb2.FetchOffsetsResponse)

    async def list_groups(self, request: coordinator_pb2.ListGroupsRequest) -> coordinator_pb2.ListGroupsResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/ListGroups", request, coordinator_pb2.ListGroupsResponse)

    async def describe_group(self, request: coordinator_pb2.DescribeGroupRequest) -> coordinator_pb2.DescribeGroupResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/DescribeGroup", request, coordinator_pb2.DescribeGroupResponse)

    async def reset_offsets(self, request: coordinator_pb2.ResetOffsetsRequest) -> coordinator_pb2.ResetOffsetsResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/ResetOffsets", request, coordinator_pb2.ResetOffsetsResponse)

    async def delete_group(self, request: coordinator_pb2.DeleteGroupRequest) -> coordinator_pb2.DeleteGroupResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/DeleteGroup", request, coordinator_pb2.DeleteGroupResponse)

    async def create_sql_table(self, request: coordinator_pb2.CreateSqlTableRequest) -> coordinator_pb2.SqlTableInfo:
        return await self._connection.unary("/streamhouse.v1.Coordinator/CreateSqlTable", request, coordinator_pb2.SqlTableInfo)

    async def drop_sql_table(self, request: coordinator_pb2.DropSqlTableRequest) -> coordinator_pb2.DropSqlTableResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/DropSqlTable", request, coordinator_pb2.DropSqlTableResponse)

    async def create_sql_job(self, request: coordinator_pb2.CreateSqlJobRequest) -> coordinator_pb2.SqlJobInfo:
        return await self._connection.unary("/streamhouse.v1.Coordinator/CreateSqlJob", request, coordinator_pb2.SqlJobInfo)

    async def list_sql_jobs(self, request: coordinator_pb2.ListSqlJobsRequest) -> coordinator_pb2.ListSqlJobsResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/ListSqlJobs", request, coordinator_pb2.ListSqlJobsResponse)

    async def alter_sql_job(self, request: coordinator_pb2.AlterSqlJobRequest) -> coordinator_pb2.SqlJobInfo:
        return await self._connection.unary("/streamhouse.v1.Coordinator/AlterSqlJob", request, coordinator_pb2.SqlJobInfo)

    async def drop_sql_job(self, request: coordinator_pb2.DropSqlJobRequest) -> coordinator_pb2.DropSqlJobResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/DropSqlJob", request, coordinator_pb2.DropSqlJobResponse)

    async def claim_sql_jobs(self, request: coordinator_pb2.ClaimSqlJobsRequest) -> coordinator_pb2.ClaimSqlJobsResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/ClaimSqlJobs", request, coordinator_pb2.ClaimSqlJobsResponse)

    async def append_sql_journal(self, request: coordinator_pb2.AppendSqlJournalRequest) -> coordinator_pb2.AppendSqlJournalResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/AppendSqlJournal", request, coordinator_pb2.AppendSqlJournalResponse)

    async def store_sql_checkpoint(self, request: coordinator_pb2.StoreSqlCheckpointRequest) -> coordinator_pb2.StoreSqlCheckpointResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/StoreSqlCheckpoint", request, coordinator_pb2.StoreSqlCheckpointResponse)

    async def fail_sql_job(self, request: coordinator_pb2.FailSqlJobRequest) -> coordinator_pb2.FailSqlJobResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/FailSqlJob", request, coordinator_pb2.FailSqlJobResponse)

    async def declare_lost(self, request: coordinator_pb2.DeclareLostRequest) -> coordinator_pb2.DeclareLostResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/DeclareLost", request, coordinator_pb2.DeclareLostResponse)

    async def complete_restore(self, request: coordinator_pb2.CompleteRestoreRequest) -> coordinator_pb2.CompleteRestoreResponse:
        return await self._connection.unary("/streamhouse.v1.Coordinator/CompleteRestore", request, coordinator_pb2.CompleteRestoreResponse)

    async def close(self) -> None:
        await self._connection.close()


class IngestApi(Protocol):
    async def produce(self, request: ingest_pb2.ProduceRequest) -> ingest_pb2.ProduceResponse: ...
    def produce_stream(self, requests: AsyncIterator[ingest_pb2.ProduceRequest]) -> AsyncIterator[ingest_pb2.ProduceResponse]: ...
    async def fence_producer(self, request: ingest_pb2.FenceProducerRequest) -> ingest_pb2.FenceProducerResponse: ...
    async def read_tail(self, request: ingest_pb2.ReadTailRequest) -> ingest_pb2.ReadTailResponse: ...
    def pull_slice(self, request: ingest_pb2.PullSliceRequest) -> AsyncIterator[ingest_pb2.PullSliceResponse]: ...
    async def describe_agent(self, request: ingest_pb2.DescribeAgentRequest) -> ingest_pb2.DescribeAgentResponse: ...


class IngestClient:
    def __init__(self, connection: Caller) -> None:
        self._connection = connection

    async def produce(self, request: ingest_pb2.ProduceRequest) -> ingest_pb2.ProduceResponse:
        return await self._connection.unary("/streamhouse.v1.Ingest/Produce", request, ingest_pb2.ProduceResponse)

    def produce_stream(self, requests: AsyncIterator[ingest_pb2.ProduceRequest]) -> AsyncIterator[ingest_pb2.ProduceResponse]:
        return self._connection.stream_stream("/streamhouse.v1.Ingest/ProduceStream", requests, ingest_pb2.ProduceResponse)

    async def fence_producer(self, request: ingest_pb2.FenceProducerRequest) -> ingest_pb2.FenceProducerResponse:
        return await self._connection.unary("/streamhouse.v1.Ingest/FenceProducer", request, ingest_pb2.FenceProducerResponse)

    async def read_tail(self, request: ingest_pb2.ReadTailRequest) -> ingest_pb2.ReadTailResponse:
        return await self._connection.unary("/streamhouse.v1.Ingest/ReadTail", request, ingest_pb2.ReadTailResponse)

    def pull_slice(self, request: ingest_pb2.PullSliceRequest) -> AsyncIterator[ingest_pb2.PullSliceResponse]:
        return self._connection.unary_stream("/streamhouse.v1.Ingest/PullSlice", request, ingest_pb2.PullSliceResponse)

    async def describe_agent(self, request: ingest_pb2.DescribeAgentRequest) -> ingest_pb2.DescribeAgentResponse:
        return await self._connection.unary("/streamhouse.v1.Ingest/DescribeAgent", request, ingest_pb2.DescribeAgentResponse)

    async def close(self) -> None:
        await self._connection.close()


class QueryApi(Protocol):
    async def fetch(self, request: query_pb2.FetchRequest) -> query_pb2.FetchResponse: ...
    def subscribe(self, requests: AsyncIterator[query_pb2.SubscribeRequest]) -> AsyncIterator[query_pb2.FetchResponse]: ...
    async def lookup_offsets(self, request: query_pb2.LookupOffsetsRequest) -> query_pb2.LookupOffsetsResponse: ...
    async def describe_query(self, request: query_pb2.DescribeQueryRequest) -> query_pb2.DescribeQueryResponse: ...


class QueryClient:
    def __init__(self, connection: Caller) -> None:
        self._connection = connection

    async def fetch(self, request: query_pb2.FetchRequest) -> query_pb2.FetchResponse:
        return await self._connection.unary("/streamhouse.v1.Query/Fetch", request, query_pb2.FetchResponse)

    def subscribe(self, requests: AsyncIterator[query_pb2.SubscribeRequest]) -> AsyncIterator[query_pb2.FetchResponse]:
        return self._connection.stream_stream("/streamhouse.v1.Query/Subscribe", requests, query_pb2.FetchResponse)

    async def lookup_offsets(self, request: query_pb2.LookupOffsetsRequest) -> query_pb2.LookupOffsetsResponse:
        return await self._connection.unary("/streamhouse.v1.Query/LookupOffsets", request, query_pb2.LookupOffsetsResponse)

    async def describe_query(self, request: query_pb2.DescribeQueryRequest) -> query_pb2.DescribeQueryResponse:
        return await self._connection.unary("/streamhouse.v1.Query/DescribeQuery", request, query_pb2.DescribeQueryResponse)

    async def close(self) -> None:
        await self._connection.close()


class SqlApi(Protocol):
    def execute(self, request: sql_pb2.ExecuteRequest) -> AsyncIterator[sql_pb2.ExecuteResponse]: ...


class SqlClient:
    def __init__(self, connection: Caller) -> None:
        self._connection = connection

    def execute(self, request: sql_pb2.ExecuteRequest) -> AsyncIterator[sql_pb2.ExecuteResponse]:
        return self._connection.unary_stream("/streamhouse.v1.Sql/Execute", request, sql_pb2.ExecuteResponse)

    async def close(self) -> None:
        await self._connection.close()
