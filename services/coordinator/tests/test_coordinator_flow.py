"""The whole way of a record's metadata, against a real PostgreSQL."""

import json
import uuid

from shproto.v1 import coordinator_pb2 as pb
from shproto.v1 import types_pb2
from streamhouse_coordinator.wiring import CoordinatorService


async def test_topic_to_registered_segment(coordinator: CoordinatorService) -> None:
    api = coordinator.api
    wal_id = uuid.uuid4().bytes
    topic = await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=2))
    session = await api.open_session(
        pb.OpenSessionRequest(agent_id="a", role="ingest", address="127.0.0.1:1", wal_id=wal_id)
    )
    grants = (await api.get_grants(pb.GetGrantsRequest(session_token=session.session_token))).grants
    assert [(g.partition, g.epoch, g.start_offset, g.limit_offset) for g in grants] == [
        (0, 1, 0, 1024),
        (1, 1, 0, 1024),
    ]
    buffer_id = str(uuid.uuid4())
    slices = [
        pb.BufferSlice(
            topic_id=topic.topic_id, partition=p, epoch=1, base_offset=0, end_offset=10, record_count=10, size_bytes=99
        )
        for p in range(2)
    ]
    await api.announce_buffer(
        pb.AnnounceBufferRequest(session_token=session.session_token, buffer_id=buffer_id, slices=slices)
    )
    claim = await api.claim_buffer(pb.ClaimBufferRequest(worker_id="w", claim_ttl_ms=5000))
    assert claim.found and claim.buffer_id == buffer_id and claim.address == "127.0.0.1:1" and len(claim.slices) == 2
    assert not (await api.claim_buffer(pb.ClaimBufferRequest(worker_id="w", claim_ttl_ms=5000))).found
    segments = [
        types_pb2.SegmentRef(
            segment_id=str(uuid.uuid4()),
            topic_id=topic.topic_id,
            partition=p,
            epoch=1,
            base_offset=0,
            end_offset=10,
            record_count=10,
            object_key="mixed/x",
            object_at=p * 100,
            size_bytes=100,
            raw_bytes=200,
        )
        for p in range(2)
    ]
    await api.declare_uploads(pb.DeclareUploadsRequest(claim_id=claim.claim_id, object_keys=["mixed/x"]))
    request = pb.RegisterSegmentsRequest(claim_id=claim.claim_id, buffer_id=buffer_id, segments=segments)
    assert list((await api.register_segments(request)).results) == [1, 1]
    assert list((await api.register_segments(request)).results) == [1, 1]
    events = []
    async for event in api.follow_events(pb.FollowEventsRequest(after_position=0)):
        events.append(event.type)
        if event.type == "BufferRegistered":
            break
    assert events == ["TopicCreated", "SessionOpened", "EpochGranted", "EpochGranted", "BufferRegistered"]
    assert json.loads(event.payload_json)["completed"]
    parts = [part async for part in api.get_snapshot(pb.GetSnapshotRequest())]
    assert {part.position for part in parts} == {5}
    assert sum(len(p.segments) for part in parts for p in part.partitions) == 2
    metadata = await api.get_metadata(pb.GetMetadataRequest(topics=["orders"]))
    assert [leader.address for leader in metadata.topics[0].leaders] == ["127.0.0.1:1"] * 2
