"""What must hold for any request: a response, or a StreamHouseError that fits the wire, in time; services live on."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import quote

from google.protobuf.message import Message
from shformat import ProducerStamp, Records, encode_batch
from shproto.errors import StreamHouseError
from shproto.limits import MESSAGE_BYTES_MAX
from shproto.v1 import coordinator_pb2 as cpb
from shproto.v1 import ingest_pb2 as ipb
from shproto.v1 import query_pb2 as qpb
from shproto.v1 import types_pb2 as tpb

from tests.fuzz.calls import METHODS, REMEMBERED, Call, decode_calls, encode_calls, fill_in, mutator, remember
from tests.fuzz.cluster import TOPIC, WAIT_MS_MAX, Cluster
from tests.fuzz.target import Finding, Target, ensure

# The longest wait a request may ask for here is far below.
CALL_SECONDS_MAX = 10
_RESPONSES_MAX = 8
_QUIET_S = 0.02
# gRPC's soft limit; its hard one is 16 KiB. Beyond, the caller gets RESOURCE_EXHAUSTED in place of our error.
_METADATA_BYTES_MAX = 8 * 1024
_INTERNAL = "INTERNAL"


class _Shell:
    """The cluster and its loop, started when first needed, and again after a service died."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(self._unhandled)
        self._cluster: Cluster | None = None
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._errors: list[BaseException] = []
        self.memory: dict[str, Any] = {}

    def _unhandled(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self._errors.append(error if error is not None else Finding(context["message"]))

    def start(self) -> None:
        if self._cluster is not None:
            return
        self._directory = tempfile.TemporaryDirectory(prefix="fuzz-cluster-")
        cluster = Cluster(Path(self._directory.name))
        self._loop.run_until_complete(cluster.start())
        self._cluster = cluster

    def close(self) -> None:
        """Ends the services and their PostgreSQL."""
        cluster, self._cluster = self._cluster, None
        if cluster is not None:
            self._loop.run_until_complete(cluster.stop())
        if self._directory is not None:
            self._directory.cleanup()

    def run(self, calls: Sequence[Call]) -> None:
        """All calls. Raises what is no proper answer, and what a service died of."""
        self.start()
        assert self._cluster is not None
        self._errors.clear()
        self._loop.run_until_complete(self._run(self._cluster, calls))
        if (error := self._cluster.died()) is not None:
            self.close()
            raise error
        if self._errors:
            raise self._errors[0]

    async def _run(self, cluster: Cluster, calls: Sequence[Call]) -> None:
        self.memory = {}
        created: set[str] = set()
        deleted = False
        for method, group in groupby(calls, key=lambda call: call.method):
            requests = [call.request for call in group]
            for request in requests:
                fill_in(request, self.memory)
                _bound_waits(request)
            await _call(cluster, method, requests, self.memory)
            if method == "Coordinator/CreateTopic":
                created |= {request.topic for request in requests if isinstance(request, cpb.CreateTopicRequest)}
            deleted |= method == "Coordinator/DeleteTopic"
        for topic in created - {TOPIC}:
            with contextlib.suppress(StreamHouseError):
                await cluster.apis["Coordinator"].delete_topic(cpb.DeleteTopicRequest(topic=topic))
        if deleted:
            await self._restore(cluster)

    async def _restore(self, cluster: Cluster) -> None:
        """A foreign session may lead now: then the topic stays empty until its lease ends."""
        with contextlib.suppress(StreamHouseError, TimeoutError):
            async with asyncio.timeout(1):
                await cluster.restore_topic()


def _bound_waits(request: Message) -> None:
    for name in ("max_wait_ms", "timeout_ms"):
        if getattr(request, name, 0) > WAIT_MS_MAX:
            setattr(request, name, WAIT_MS_MAX)
    if isinstance(request, cpb.FollowEventsRequest):
        request.session_token = ""  # else the agent of that session is looked for on the network when we hang up


async def _call(cluster: Cluster, method: str, requests: list[Any], memory: dict[str, Any]) -> None:
    service, name = method.split("/")
    call = getattr(cluster.apis[service], "".join(f"_{c.lower()}" if c.isupper() else c for c in name)[1:])
    descriptor = METHODS[method]
    if descriptor.client_streaming:
        await _answered(_take(call(_each(requests)), memory), method)
        return
    for request in requests:
        answer = _take(call(request), memory) if descriptor.server_streaming else _one(call(request), memory)
        await _answered(answer, method)


@contextlib.asynccontextmanager
async def _seconds(count: int) -> AsyncIterator[None]:
    """Raises TimeoutError after so many turns of a second each. A machine that stood still for a minute had one turn:
    that is no finding."""
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle | None = None

    def turn(left: int) -> None:
        nonlocal timer
        if left:
            timer = loop.call_later(1, turn, left - 1)
        else:
            limit.reschedule(loop.time())

    async with asyncio.timeout(None) as limit:
        timer = loop.call_later(1, turn, count - 1)
        try:
            yield
        finally:
            timer.cancel()


async def _answered(answer: Any, method: str) -> None:
    try:
        async with _seconds(CALL_SECONDS_MAX):
            await answer
    except StreamHouseError as error:
        _check_error(error)
    except TimeoutError as error:
        raise Finding(f"{method} did not answer within {CALL_SECONDS_MAX} s") from error


def _check_error(error: StreamHouseError) -> None:
    ensure(error.reason != _INTERNAL, f"an internal error: {error.message}")
    detail = error.to_detail().SerializeToString()
    size_bytes = len(detail) * 4 // 3 + len(quote(error.message))
    ensure(size_bytes <= _METADATA_BYTES_MAX, f"{type(error).__name__} is too large for gRPC metadata")


async def _one(call: Any, memory: dict[str, Any]) -> None:
    _check_response(await call, memory)


async def _take(responses: Any, memory: dict[str, Any]) -> None:
    """Responses of a stream until it ends, is quiet, or there were enough."""
    async with contextlib.aclosing(responses):
        for _ in range(_RESPONSES_MAX):
            try:
                async with asyncio.timeout(_QUIET_S):
                    _check_response(await anext(responses), memory)
            except (StopAsyncIteration, TimeoutError):
                return


def _check_response(response: Message, memory: dict[str, Any]) -> None:
    ensure(len(response.SerializeToString()) <= MESSAGE_BYTES_MAX, "a response above MESSAGE_BYTES_MAX")
    error = getattr(response, "error", None)
    ensure(error is None or error.reason != _INTERNAL, "an internal error in a response")
    remember(response, memory)


async def _each(requests: list[Any]) -> AsyncIterator[Any]:
    for request in requests:
        yield request


@cache
def shell() -> _Shell:
    """The one cluster of this process."""
    return _Shell()


def check_calls(data: bytes) -> None:
    """One input: a sequence of calls."""
    calls = decode_calls(data)
    if calls:
        shell().run(calls)


# ---- seeds: what a client, an agent and a worker say


def _ingest_seeds() -> list[bytes]:
    batch = encode_batch(Records.from_lists([b"one", None, b"three"], timestamps_ms=5))
    records = tpb.RecordList(records=[tpb.Record(key=b"k", value=b"v", headers=[tpb.Header(key="h", value=b"1")])])
    produce = ipb.ProduceRequest(topic=TOPIC, batch=batch)
    plain = ipb.ProduceRequest(topic=TOPIC, partition=1, acks=tpb.ACKS_NONE, records=records)
    fence = ipb.FenceProducerRequest(topic=TOPIC, producer_id=7, producer_epoch=1)
    stamped = encode_batch(Records.from_lists([b"one"], timestamps_ms=5), producer=ProducerStamp(7, 1, 0))
    sequenced = ipb.ProduceRequest(topic=TOPIC, sequenced_batch=stamped)
    tail = ipb.ReadTailRequest(topic_id=b"$", offset=REMEMBERED, max_bytes=1000, max_wait_ms=5)
    pull = ipb.PullSliceRequest(topic_id=b"$", epoch=REMEMBERED, base_offset=REMEMBERED, end_offset=REMEMBERED)
    topics = Call("Coordinator/ListTopics", cpb.ListTopicsRequest())
    return [
        encode_calls([Call("Ingest/Produce", produce), Call("Ingest/Produce", plain)]),
        encode_calls([Call("Ingest/ProduceStream", produce), Call("Ingest/ProduceStream", plain)]),
        encode_calls([topics, Call("Ingest/Produce", produce), Call("Ingest/ReadTail", tail)]),
        encode_calls([topics, Call("Ingest/Produce", produce), Call("Ingest/PullSlice", pull)]),
        encode_calls([topics, Call("Ingest/FenceProducer", fence), Call("Ingest/Produce", sequenced)]),
        encode_calls([Call("Ingest/DescribeAgent", ipb.DescribeAgentRequest())]),
    ]


def _query_seeds() -> list[bytes]:
    fetch = qpb.FetchRequest(topic=TOPIC, max_bytes=1000, format=qpb.FETCH_FORMAT_RECORDS)
    position = qpb.FetchPosition(topic=TOPIC, offset=10)
    lookups = [qpb.OffsetLookup(topic=TOPIC, spec=spec, timestamp_ms=5) for spec in (1, 2, 3)]  # type: ignore[arg-type]
    return [
        encode_calls([Call("Query/Fetch", fetch)]),
        encode_calls([Call("Query/Fetch", qpb.FetchRequest(topic=TOPIC, offset=25, min_bytes=10, max_wait_ms=5))]),
        encode_calls([Call("Query/Subscribe", qpb.SubscribeRequest(positions=[position], max_bytes=100))]),
        encode_calls([Call("Query/LookupOffsets", qpb.LookupOffsetsRequest(lookups=lookups))]),
        encode_calls([Call("Query/DescribeQuery", qpb.DescribeQueryRequest())]),
    ]


def _coordinator_seeds() -> list[bytes]:
    span: dict[str, Any] = {"topic_id": b"$", "epoch": 1, "end_offset": 10}
    sizes: dict[str, Any] = {"record_count": 10, "size_bytes": 10}
    uuid = "00000000-0000-4000-8000-000000000001"
    segment = tpb.SegmentRef(segment_id=uuid, topic=TOPIC, object_key="data/k", **span, **sizes)
    part = cpb.BufferSlice(topic=TOPIC, **span, **sizes)
    key: dict[str, Any] = {"topic_id": b"$", "partition": REMEMBERED, "epoch": REMEMBERED}
    use = cpb.RangeUse(**key, next_offset=REMEMBERED)
    own = cpb.BufferSlice(topic="fuzzed", end_offset=10, **key, **sizes)
    own_segment = tpb.SegmentRef(segment_id=uuid, topic="fuzzed", object_key="data/k", end_offset=10, **key, **sizes)
    end = cpb.WalEnd(**key, end_offset=10)
    lost = cpb.LostSpan(**span, reason="r")
    open_session = Call("Coordinator/OpenSession", cpb.OpenSessionRequest(agent_id="fuzzed", role="query"))
    create = Call("Coordinator/CreateTopic", cpb.CreateTopicRequest(topic="fuzzed", partitions=2, retention_ms=1))
    join = Call("Coordinator/JoinGroup", cpb.JoinGroupRequest(group="g", topics=[TOPIC], client_id="c"))
    member: dict[str, Any] = {"group": "g", "member_id": "$", "generation": REMEMBERED}
    owned = cpb.TopicPartition(topic=TOPIC)
    heartbeat = cpb.HeartbeatGroupRequest(**member, owned=[owned], max_wait_ms=5)
    commit = cpb.CommitOffsetsRequest(**member, offsets=[cpb.OffsetCommit(topic=TOPIC, offset=5)])
    sequences: list[list[Call]] = [
        [create, Call("Coordinator/DescribeTopic", cpb.DescribeTopicRequest(topic="fuzzed")),
         Call("Coordinator/DeleteRecords", cpb.DeleteRecordsRequest(topic="fuzzed")),
         Call("Coordinator/AlterTopic", cpb.AlterTopicRequest(topic="fuzzed", partitions=3, unset=["retention_ms"])),
         Call("Coordinator/DeleteTopic", cpb.DeleteTopicRequest(topic="fuzzed"))],
        [Call("Coordinator/GetMetadata", cpb.GetMetadataRequest(topics=[TOPIC, "missing"]))],
        [open_session, Call("Coordinator/Heartbeat", cpb.HeartbeatRequest(session_token="$")),
         Call("Coordinator/GetGrants", cpb.GetGrantsRequest(session_token="$")),
         Call("Coordinator/SettleRanges", cpb.SettleRangesRequest(session_token="$", ends=[cpb.WalEnd(**span)])),
         Call("Coordinator/CloseSession", cpb.CloseSessionRequest(session_token="$"))],
        [open_session, Call("Coordinator/ListTopics", cpb.ListTopicsRequest()),
         Call("Coordinator/AnnounceBuffer",
              cpb.AnnounceBufferRequest(session_token="$", buffer_id=uuid, slices=[part])),
         Call("Coordinator/ReportLost", cpb.ReportLostRequest(session_token="$", spans=[lost]))],
        [Call("Coordinator/OpenSession", cpb.OpenSessionRequest(agent_id="leader", role="ingest", wal_id=b"\1" * 16)),
         create, Call("Coordinator/GetGrants", cpb.GetGrantsRequest(session_token="$")),
         Call("Coordinator/Heartbeat", cpb.HeartbeatRequest(session_token="$", low_ranges=[use])),
         Call("Coordinator/AnnounceBuffer", cpb.AnnounceBufferRequest(session_token="$", buffer_id=uuid, slices=[own])),
         Call("Coordinator/RegisterSegments", cpb.RegisterSegmentsRequest(buffer_id="$", segments=[own_segment])),
         Call("Coordinator/SettleRanges", cpb.SettleRangesRequest(session_token="$", ends=[end])),
         Call("Coordinator/CloseSession", cpb.CloseSessionRequest(session_token="$"))],
        [Call("Coordinator/OpenSession", cpb.OpenSessionRequest(agent_id="leader", role="ingest", wal_id=b"\1" * 16)),
         create, Call("Coordinator/GetGrants", cpb.GetGrantsRequest(session_token="$")),
         Call("Coordinator/RegisterFence",
              cpb.RegisterFenceRequest(session_token="$", **key, producer_id=7, producer_epoch=1))],
        [Call("Coordinator/ClaimBuffer", cpb.ClaimBufferRequest(worker_id="w", claim_ttl_ms=1000)),
         Call("Coordinator/RenewClaim", cpb.RenewClaimRequest(claim_id="$", claim_ttl_ms=1000)),
         Call("Coordinator/DeclareUploads", cpb.DeclareUploadsRequest(claim_id="$", object_keys=["data/k"])),
         Call("Coordinator/ReleaseClaim", cpb.ReleaseClaimRequest(claim_id="$", reason="r"))],
        [Call("Coordinator/ListTopics", cpb.ListTopicsRequest()),
         Call("Coordinator/RegisterSegments", cpb.RegisterSegmentsRequest(segments=[segment])),
         Call("Coordinator/RegisterCompaction",
              cpb.RegisterCompactionRequest(claim_id="$", replaced_segment_ids=[uuid], segment=segment))],
        [Call("Coordinator/ClaimCompaction", cpb.ClaimCompactionRequest(
            worker_id="w", claim_ttl_ms=1000, small_bytes_max=1000, target_bytes=10_000, segments_min=2)),
         Call("Coordinator/ApplyRetention", cpb.ApplyRetentionRequest()),
         Call("Coordinator/FilterUnreferenced", cpb.FilterUnreferencedRequest(object_keys=["data/k"])),
         Call("Coordinator/BeginDeletion",
              cpb.BeginDeletionRequest(object_keys=["data/k"], grace_ms=1000, confirm_ms=1)),
         Call("Coordinator/ListDeletions", cpb.ListDeletionsRequest(grace_ms=1, confirm_ms=1, limit=10)),
         Call("Coordinator/FinishDeletion", cpb.FinishDeletionRequest(object_keys=["data/k"]))],
        [join, Call("Coordinator/HeartbeatGroup", heartbeat), Call("Coordinator/CommitOffsets", commit),
         Call("Coordinator/FetchOffsets", cpb.FetchOffsetsRequest(group="g", partitions=[owned])),
         Call("Coordinator/LeaveGroup", cpb.LeaveGroupRequest(group="g", member_id="$"))],
        [Call("Coordinator/FollowEvents", cpb.FollowEventsRequest(types=["TopicCreated"])),
         Call("Coordinator/GetSnapshot", cpb.GetSnapshotRequest()),
         Call("Coordinator/GetStatus", cpb.GetStatusRequest()),
         Call("Coordinator/GetHead", cpb.GetHeadRequest()),
         Call("Coordinator/InitProducer", cpb.InitProducerRequest()),
         Call("Coordinator/InitProducer", cpb.InitProducerRequest(name="sink")),
         Call("Coordinator/DeleteProducer", cpb.DeleteProducerRequest(name="sink"))],
    ]  # fmt: skip
    return [encode_calls(calls) for calls in sequences]


def _target(name: str, seeds: Callable[[], list[bytes]], *others: str) -> Target:
    universe = [method for method in METHODS if method.split("/")[0].lower() == name] + list(others)
    return Target(
        name, check_calls, seeds, mutator(universe),
        size_bytes_max=16 * 1024, memory_bytes_max=1024 * 1024 * 1024,
        prepare=lambda: shell().start(), close=lambda: shell().close(),
    )  # fmt: skip


TARGETS = (
    _target("ingest", _ingest_seeds, "Coordinator/ListTopics"),
    _target("query", _query_seeds, "Ingest/Produce"),
    _target("coordinator", _coordinator_seeds),
)
