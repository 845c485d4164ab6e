"""G1: a range is never settled below what its leader acknowledged, whoever asks, unless an operator gives it up."""

from typing import Any

import pytest
from shproto.errors import AgentIdTaken, InvalidArgument
from shproto.services import IngestApi
from shproto.v1 import coordinator_pb2 as pb
from shproto.v1 import ingest_pb2, types_pb2
from shruntime.server import RpcServer
from streamhouse_coordinator.api import CoordinatorApi
from streamhouse_coordinator.wiring import CoordinatorService

pytestmark = pytest.mark.long

WIDTH = 1024


@pytest.fixture
async def api(coordinator: CoordinatorService) -> CoordinatorApi:
    await coordinator.api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=1))
    return coordinator.api


async def ranges_of(api: CoordinatorApi) -> list[types_pb2.OffsetRange]:
    described = await api.describe_topic(pb.DescribeTopicRequest(topic="orders"))
    return list(described.partitions[0].ranges)


async def test_g1_a_log_without_what_it_announced_leaves_its_range_waiting(
    api: CoordinatorApi, open_agent: Any, all_events: Any
) -> None:
    """A snapshot of the agent's disk came back: 15 records that it had acknowledged vanished without an error."""
    agent = await open_agent(api, "a")
    grant = (await agent.leads())[0]
    key = (grant.topic_id, 0, 1)
    assert await agent.write(grant, 0, 10) == pb.REGISTRATION_RESULT_REGISTERED
    await agent.announce((grant, 10, 25))
    for end in (12, 12, 20):  # whatever it says of its end, and however often it starts
        await agent.open({key: end})
        assert [(r.epoch, r.status, r.HasField("end_offset")) for r in agent.session.resumed] == [
            (1, "orphaned", False)
        ]
        new = (await agent.leads())[0]
        assert new.start_offset >= WIDTH, "writes go on at once, beyond everything the old range may hold"
    old = (await ranges_of(api))[0]
    assert (old.status, old.registered_end, old.acknowledged_end) == ("orphaned", 10, 25)
    found = await all_events(api, "LogFoundTruncated")
    assert len(found) == 1, "noted once"
    assert '"log_end":12,"acknowledged_end":25' in found[0].payload_json
    assert await agent.write(grant, 10, 20) == pb.REGISTRATION_RESULT_REGISTERED, "what it has is uploaded"
    leases = (await api.get_status(pb.GetStatusRequest())).leases
    assert [(r.epoch, r.acknowledged_end) for r in leases[0].unsettled] == [(1, 25)]
    await agent.open({key: 25})  # the right disk
    assert [(r.epoch, r.end_offset) for r in agent.session.resumed if r.epoch == 1] == [(1, 25)]
    assert await agent.write(grant, 20, 25) == pb.REGISTRATION_RESULT_REGISTERED


async def test_an_operator_gives_up_what_a_truncated_log_lacks(api: CoordinatorApi, open_agent: Any) -> None:
    agent = await open_agent(api, "a")
    grant = (await agent.leads())[0]
    await agent.announce((grant, 0, 25))
    await agent.open()
    assert [(r.status, r.acknowledged_end) for r in await ranges_of(api)] == [("orphaned", 25), ("open", 0)]
    answer = await api.declare_lost(pb.DeclareLostRequest(topic="orders", partition=0, epochs=[1]))
    assert [r.status for r in answer.ranges] == ["lost"]


async def test_a_leader_that_leaves_cannot_take_back_what_it_announced(api: CoordinatorApi, open_agent: Any) -> None:
    agent = await open_agent(api, "a")
    grant = (await agent.leads())[0]
    await agent.announce((grant, 0, 25))
    with pytest.raises(InvalidArgument, match="acknowledged up to 25"):
        await agent.settle((grant, 24))
    ends = [pb.WalEnd(topic_id=grant.topic_id, partition=0, epoch=1, end_offset=24)]
    with pytest.raises(InvalidArgument, match="acknowledged up to 25"):
        await api.close_session(pb.CloseSessionRequest(session_token=agent.session.session_token, ends=ends))
    assert [(r.epoch, r.status) for r in await ranges_of(api)] == [(1, "open")], "nothing half done"
    await agent.settle((grant, 25))
    assert (await ranges_of(api))[0].end_offset == 25


async def test_where_only_durable_records_are_acknowledged_nothing_waits(api: CoordinatorApi, open_agent: Any) -> None:
    await api.create_topic(pb.CreateTopicRequest(topic="durable", partitions=1, min_acks=types_pb2.ACKS_DURABLE))
    agent = await open_agent(api, "a")
    grant = next(item for item in await agent.grants() if item.topic == "durable")
    await agent.announce((grant, 0, 25))
    await agent.open({(grant.topic_id, 0, 1): 12})
    assert [(r.topic, r.end_offset) for r in agent.session.resumed] == [("durable", 12)]


class LiveAgent:
    """What an ingest agent answers on the network; of a whole agent only this is asked."""

    def __init__(self) -> None:
        self.session_id = ""

    async def describe_agent(self, request: ingest_pb2.DescribeAgentRequest) -> ingest_pb2.DescribeAgentResponse:
        return ingest_pb2.DescribeAgentResponse(session_id=self.session_id)

    def __getattr__(self, name: str) -> Any:
        assert hasattr(IngestApi, name)
        return None


@pytest.mark.smoke
async def test_g1_a_copy_of_a_live_agents_log_does_not_take_its_place(api: CoordinatorApi, open_agent: Any) -> None:
    """A machine was cloned, and the clone started: its log settled the ranges below what the first had acknowledged."""
    live = LiveAgent()
    server = RpcServer("127.0.0.1:0", [(ingest_pb2.DESCRIPTOR.services_by_name["Ingest"], live)])
    await server.start()
    try:
        agent = await open_agent(api, "a", server.address)
        live.session_id = agent.session.session_id
        grant = (await agent.leads())[0]
        clone = await open_agent_like(agent, "127.0.0.1:2")
        with pytest.raises(AgentIdTaken, match="works on a copy"):
            await clone.open({(grant.topic_id, 0, 1): 0})
        with pytest.raises(AgentIdTaken):  # also one that says it lives where the first does
            await (await open_agent_like(agent, server.address)).open({(grant.topic_id, 0, 1): 0})
        assert [(r.epoch, r.status) for r in await ranges_of(api)] == [(1, "open")]
        assert [(g.epoch, g.status) for g in await agent.grants()] == [(1, "open")], "it goes on"
        live.session_id = ""  # it has lost its session, or is a new process at the same address
        await agent.open({(grant.topic_id, 0, 1): 7})
        assert (await agent.leads())[0].start_offset == 7
    finally:
        await server.stop(0)


async def open_agent_like(agent: Any, address: str) -> Any:
    """The same log at another place; its session is not open yet."""
    clone = type(agent)(agent.api, agent.name, address)
    clone.wal_id = agent.wal_id
    return clone
