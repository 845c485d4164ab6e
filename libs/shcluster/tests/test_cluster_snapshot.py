"""An index loaded from a snapshot and an index that followed the events are the same."""

import shproto.events as ev
from shcluster.index import ClusterIndex
from shcluster.snapshot import SnapshotBuilder
from shproto.acks import ACKS_WAL
from shproto.model import RangeStatus
from shproto.v1 import coordinator_pb2, types_pb2

TOPIC_ID = "ab" * 16
WAL_ID = "cd" * 16
LOST_LEADER_MS = 1_790_000_000_000


def test_a_range_that_lost_its_leader_is_the_same_from_events_and_from_a_snapshot() -> None:
    followed, loaded = from_events(), from_snapshot()
    (key,) = followed.partitions
    assert followed.partitions[key].ranges[0].status is RangeStatus.ORPHANED
    assert followed.partitions == loaded.partitions
    assert followed.topics == loaded.topics


def from_events() -> ClusterIndex:
    index = ClusterIndex()
    events = [
        ev.TopicCreated(
            topic_id=TOPIC_ID,
            topic="orders",
            partitions=1,
            retention_ms=None,
            retention_bytes=None,
            min_acks=ACKS_WAL,
            unclean_recovery_after_ms=None,
            created_ms=0,
        ),
        ev.EpochGranted(
            topic_id=TOPIC_ID,
            topic="orders",
            partition=0,
            epoch=1,
            session_id="s",
            agent_id="a",
            wal_id=WAL_ID,
            start_offset=0,
            limit_offset=100,
        ),
        ev.RangeOrphaned(topic_id=TOPIC_ID, partition=0, epoch=1, orphaned_ms=LOST_LEADER_MS),
    ]
    for position, event in enumerate(events, start=1):
        index.apply(position, event)
    return index


def from_snapshot() -> ClusterIndex:
    orphaned = types_pb2.OffsetRange(
        epoch=1,
        start_offset=0,
        limit_offset=100,
        registered_end=0,
        status="orphaned",
        agent_id="a",
        wal_id=bytes.fromhex(WAL_ID),
        orphaned_ms=LOST_LEADER_MS,
    )
    topic = coordinator_pb2.TopicInfo(
        topic_id=bytes.fromhex(TOPIC_ID), topic="orders", partitions=1, min_acks=types_pb2.Acks.ValueType(ACKS_WAL)
    )
    builder = SnapshotBuilder()
    builder.add(
        coordinator_pb2.SnapshotPart(
            position=3,
            partitions=[
                coordinator_pb2.SnapshotPartition(topic=topic, partition=0, log_start_offset=0, ranges=[orphaned])
            ],
        )
    )
    return builder.cluster
