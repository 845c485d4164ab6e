"""Operators' commands against a real PostgreSQL: groups looked at, moved and deleted; ranges declared lost."""

import asyncio
import json
from typing import Any

import asyncpg
import pytest
from shproto.errors import GroupNotEmpty, InvalidArgument, UnknownGroup, UnknownPartition, UnknownTopic
from shproto.v1 import coordinator_pb2 as pb
from streamhouse_coordinator.api import CoordinatorApi
from streamhouse_coordinator.wiring import CoordinatorService

pytestmark = pytest.mark.long

REGISTERED, FENCED = pb.REGISTRATION_RESULT_REGISTERED, pb.REGISTRATION_RESULT_FENCED


@pytest.fixture
async def api(coordinator: CoordinatorService) -> CoordinatorApi:
    await coordinator.api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=2))
    return coordinator.api


def commits(*offsets: tuple[int, int], topic: str = "orders") -> list[pb.OffsetCommit]:
    return [pb.OffsetCommit(topic=topic, partition=partition, offset=offset) for partition, offset in offsets]


async def describe(api: CoordinatorApi, group: str = "g") -> pb.DescribeGroupResponse:
    return await api.describe_group(pb.DescribeGroupRequest(group=group))


async def join(api: CoordinatorApi, group: str = "g") -> pb.GroupAssignment:
    return await api.join_group(pb.JoinGroupRequest(group=group, topics=["orders"], client_id="c"))


async def orphan(api: CoordinatorApi, agent: Any) -> pb.RangeGrant:
    """Partition 0's range of an agent that leaves without settling it, 10 records of it registered."""
    grant: pb.RangeGrant = (await agent.leads())[0]
    assert await agent.write(grant, 0, 10) == REGISTERED
    await agent.close()
    return grant


# ---- groups


@pytest.mark.smoke
async def test_a_group_is_described_with_members_and_positions(api: CoordinatorApi, open_agent: Any) -> None:
    agent = await open_agent(api, "a")
    grants = await agent.leads()
    await agent.write(grants[0], 0, 100)
    await agent.close()
    await open_agent(api, "b")  # takes over behind a gap
    one, two = await join(api), await join(api)
    summary = (await describe(api)).summary
    assert (summary.state, summary.generation, summary.members) == ("rebalancing", 2, 2)
    for member in (one, two, one):
        owned = [pb.TopicPartition(topic="orders", partition=0 if member is one else 1)]
        owned = owned if member is one else []
        await api.heartbeat_group(
            pb.HeartbeatGroupRequest(group="g", member_id=member.member_id, generation=2, owned=owned)
        )
    await api.heartbeat_group(pb.HeartbeatGroupRequest(group="g", member_id=two.member_id, generation=2))
    await api.commit_offsets(
        pb.CommitOffsetsRequest(group="g", member_id=one.member_id, generation=2, offsets=commits((0, 40)))
    )
    described = await describe(api)
    assert described.summary.state == "stable" and described.summary.committed_partitions == 1
    by_id = {member.member_id: member for member in described.members}
    assert [item.partition for item in by_id[one.member_id].owned] == [0]
    assert [item.partition for item in by_id[two.member_id].assigned] == [1]
    assert by_id[one.member_id].client_id == "c" and by_id[one.member_id].expires_in_ms > 0
    zero, first = described.partitions
    assert (zero.offset, zero.member_id, first.offset) == (40, one.member_id, -1)
    assert (zero.older_records, zero.exact, zero.newest_start_offset) == (60, False, 1024)


async def test_groups_are_listed(api: CoordinatorApi) -> None:
    assert list((await api.list_groups(pb.ListGroupsRequest())).groups) == []
    await join(api, "b")
    await api.commit_offsets(pb.CommitOffsetsRequest(group="a", offsets=commits((0, 1), (1, 1))))
    listed = (await api.list_groups(pb.ListGroupsRequest())).groups
    assert [(item.group, item.state, item.members, item.committed_partitions) for item in listed] == [
        ("a", "empty", 0, 2),
        ("b", "stable", 1, 0),
    ]
    with pytest.raises(UnknownGroup):
        await describe(api, "nobody")


async def test_offsets_are_reset_only_without_members_and_leave_an_event(api: CoordinatorApi, all_events: Any) -> None:
    await api.commit_offsets(pb.CommitOffsetsRequest(group="g", offsets=commits((0, 10))))
    request = pb.ResetOffsetsRequest(group="g", offsets=commits((0, 3), (1, 0)))
    member = await join(api)
    with pytest.raises(GroupNotEmpty):
        await api.reset_offsets(request)
    await api.leave_group(pb.LeaveGroupRequest(group="g", member_id=member.member_id))
    await api.reset_offsets(request)
    await api.reset_offsets(request)  # a retry is no second event
    found = await api.fetch_offsets(pb.FetchOffsetsRequest(group="g"))
    assert [(item.partition, item.offset) for item in found.offsets] == [(0, 3), (1, 0)]
    (event,) = await all_events(api, "OffsetsReset")
    changes = json.loads(event.payload_json)["changes"]
    assert [(item["partition"], item["offset_before"], item["offset"]) for item in changes] == [(0, 10, 3), (1, -1, 0)]
    with pytest.raises(UnknownTopic):
        await api.reset_offsets(pb.ResetOffsetsRequest(group="g", offsets=commits((0, 1), topic="nope")))
    deleted = pb.OffsetCommit(topic="orders", partition=0, offset=1, topic_id=bytes(16))
    with pytest.raises(UnknownTopic, match="another one"):
        await api.reset_offsets(pb.ResetOffsetsRequest(group="g", offsets=[deleted]))
    with pytest.raises(UnknownPartition):
        await api.reset_offsets(pb.ResetOffsetsRequest(group="g", offsets=commits((0, 9), (2, 1))))
    with pytest.raises(InvalidArgument):
        await api.reset_offsets(pb.ResetOffsetsRequest(group="g"))
    assert [item.offset for item in (await describe(api)).partitions] == [3, 0], "all or none"


async def test_a_deleted_group_is_gone_and_may_come_again(
    api: CoordinatorApi, coordinator: CoordinatorService, all_events: Any
) -> None:
    member = await join(api)
    delete = pb.DeleteGroupRequest(group="g")
    with pytest.raises(GroupNotEmpty):
        await api.delete_group(delete)
    await api.leave_group(pb.LeaveGroupRequest(group="g", member_id=member.member_id))
    await api.commit_offsets(pb.CommitOffsetsRequest(group="g", offsets=commits((0, 10))))
    await api.delete_group(delete)
    assert len(await all_events(api, "GroupDeleted")) == 1
    with pytest.raises(UnknownGroup):
        await api.delete_group(delete)
    with pytest.raises(UnknownGroup):
        await describe(api)
    await coordinator.context.store.rebuild()
    assert list((await api.list_groups(pb.ListGroupsRequest())).groups) == []
    assert (await join(api)).generation == 1
    assert [item.offset for item in (await describe(api)).partitions] == [-1, -1]


async def test_a_reset_and_a_join_at_once_never_both_win(two_coordinators: Any) -> None:
    """A member that got its partitions before the reset would go on at its own offsets."""
    apis = [service.api for service in two_coordinators]
    await apis[0].create_topic(pb.CreateTopicRequest(topic="orders", partitions=1))
    for number in range(5):
        group = f"g{number}"
        reset = pb.ResetOffsetsRequest(group=group, offsets=commits((0, 3)))
        joining = asyncio.create_task(join(apis[0], group))
        refused = False
        try:
            await apis[1].reset_offsets(reset)
        except GroupNotEmpty:
            refused = True
        await joining
        offsets = [item.offset for item in (await describe(apis[0], group)).partitions]
        assert offsets == ([-1] if refused else [3])


# ---- ranges


@pytest.mark.smoke
async def test_an_operator_declares_an_orphaned_range_lost(
    api: CoordinatorApi, open_agent: Any, all_events: Any
) -> None:
    """G4: the agent that comes back too late finds its records kept out."""
    agent = await open_agent(api, "a")
    grant = (await agent.leads())[0]
    await agent.write(grant, 0, 10)
    await agent.announce((grant, 10, 20))
    await agent.close()
    heir = await open_agent(api, "b")
    (lease, _) = (await api.get_status(pb.GetStatusRequest())).leases
    (waiting,) = lease.unsettled
    orphaned = json.loads((await all_events(api, "RangeOrphaned"))[0].payload_json)
    assert (waiting.status, waiting.registered_end, waiting.orphaned_ms) == ("orphaned", 10, orphaned["orphaned_ms"])
    request = pb.DeclareLostRequest(topic="orders", partition=0, epochs=[1], reason="the disk burnt")
    (lost,) = (await api.declare_lost(request)).ranges
    assert (lost.status, lost.registered_end, lost.end_offset, lost.limit_offset) == ("lost", 10, 1024, 1024)
    assert list((await api.declare_lost(request)).ranges) == [lost], "asked again, nothing changes"
    (event,) = await all_events(api, "RangeLost")
    assert json.loads(event.payload_json)["why"] == "operator the disk burnt"
    status = await api.get_status(pb.GetStatusRequest())
    assert not status.leases[0].unsettled
    assert status.buffers_waiting == 0, "nobody would ever claim what is left of it"
    await agent.open({(grant.topic_id, 0, 1): 20})
    assert await agent.write(grant, 10, 20) == FENCED
    (given_up,) = [item for item in agent.session.resumed if item.partition == 0]
    assert (given_up.status, given_up.registered_end) == ("lost", 10)
    assert given_up in await agent.grants(), "told as often as it asks"
    assert (await heir.leads())[0].start_offset == 1024


async def test_what_is_led_settled_or_not_there_is_not_declared_lost(
    api: CoordinatorApi, open_agent: Any, all_events: Any
) -> None:
    agent = await open_agent(api, "a")

    def request(partition: int = 0, *epochs: int, topic: str = "orders") -> pb.DeclareLostRequest:
        return pb.DeclareLostRequest(topic=topic, partition=partition, epochs=epochs)

    with pytest.raises(InvalidArgument, match="led by agent a"):
        await api.declare_lost(request(0, 1))
    with pytest.raises(InvalidArgument, match="no epoch 7"):
        await api.declare_lost(request(0, 7))
    with pytest.raises(InvalidArgument, match="epochs"):
        await api.declare_lost(request(0, 2**64 - 1))
    with pytest.raises(InvalidArgument, match="number of epochs"):
        await api.declare_lost(request(0))
    with pytest.raises(UnknownPartition):
        await api.declare_lost(request(2, 1))
    with pytest.raises(UnknownTopic):
        await api.declare_lost(request(0, 1, topic="nope"))
    grant = await orphan(api, agent)
    await agent.open({(grant.topic_id, 0, 1): 15})
    (row,) = (await api.declare_lost(request(0, 1))).ranges
    assert (row.status, row.end_offset) == ("settled", 15), "the agent was faster: nothing is given up"
    assert await all_events(api, "RangeLost") == []


async def test_the_newest_range_can_be_declared_lost_when_nobody_took_over(
    api: CoordinatorApi, open_agent: Any
) -> None:
    await orphan(api, await open_agent(api, "a"))
    lease = (await api.get_status(pb.GetStatusRequest())).leases[0]
    assert lease.status == "unassigned" and lease.unsettled[0].orphaned_ms > 0
    partition = (await api.describe_topic(pb.DescribeTopicRequest(topic="orders"))).partitions[0]
    assert partition.ranges[0].orphaned_ms == lease.unsettled[0].orphaned_ms
    await api.declare_lost(pb.DeclareLostRequest(topic="orders", partition=0, epochs=[1]))
    heir = await open_agent(api, "b")
    assert (await heir.leads())[0].start_offset == 1024


async def test_a_buffer_with_something_left_stays(api: CoordinatorApi, open_agent: Any) -> None:
    """One sealed buffer holds a slice of a range that is given up and one of a range that goes on."""
    agent = await open_agent(api, "a")
    grants = await agent.leads()
    await agent.announce((grants[0], 0, 10), (grants[1], 0, 10))
    await agent.close()
    await api.declare_lost(pb.DeclareLostRequest(topic="orders", partition=0, epochs=[1]))
    assert (await api.get_status(pb.GetStatusRequest())).buffers_waiting == 1
    await api.declare_lost(pb.DeclareLostRequest(topic="orders", partition=1, epochs=[1]))
    assert (await api.get_status(pb.GetStatusRequest())).buffers_waiting == 0


async def test_the_same_by_policy_also_of_the_buffers(
    coordinator: CoordinatorService, open_agent: Any, all_events: Any
) -> None:
    api = coordinator.api
    await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=1, unclean_recovery_after_ms=0))
    await api.create_topic(pb.CreateTopicRequest(topic="kept", partitions=1))
    agent = await open_agent(api, "a")
    for grant in await agent.grants():
        await agent.announce((grant, 0, 10))
    await agent.close()
    async with asyncio.timeout(60):
        while not (lost := await all_events(api, "RangeLost")):
            await asyncio.sleep(0.02)
    assert json.loads(lost[0].payload_json)["why"] == "unclean_recovery_after_ms"
    leases = (await api.get_status(pb.GetStatusRequest())).leases
    assert {lease.topic: len(lease.unsettled) for lease in leases} == {"orders": 0, "kept": 1}
    assert (await api.get_status(pb.GetStatusRequest())).buffers_waiting == 1


async def test_the_head_is_that_of_the_status(api: CoordinatorApi) -> None:
    before = await api.get_status(pb.GetStatusRequest())
    head = await api.get_head(pb.GetHeadRequest())
    after = await api.get_status(pb.GetStatusRequest())
    assert 0 < before.events_position <= head.events_position <= after.events_position
    assert head.history_id == before.history_id == after.history_id != ""


async def test_the_status_bears_a_topic_that_is_created_while_it_is_read(api: CoordinatorApi, dsn: str) -> None:
    """Each of its statements sees what was committed before it."""
    connection = await asyncpg.connect(dsn)
    async with connection.transaction():
        await connection.execute("LOCK TABLE partitions IN ACCESS EXCLUSIVE MODE")  # here the status has to wait
        asking = asyncio.create_task(api.get_status(pb.GetStatusRequest()))
        while not await connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
            await asyncio.sleep(0.01)
        await connection.execute("INSERT INTO topics VALUES ('aa', 'new', 1, NULL, NULL, 2, NULL, 0)")
        await connection.execute("INSERT INTO partitions VALUES ('aa', 0, 0, 0)")
    assert {lease.topic for lease in (await asking).leases} >= {"orders"}
    await connection.close()
