"""An agent that leaves in good order, or has no room in its log: its partitions go on elsewhere, where it ended."""

from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from shproto.v1 import coordinator_pb2 as pb
from streamhouse_coordinator.wiring import CoordinatorService


async def test_partitions_of_a_leaving_agent_go_on_elsewhere_without_a_gap(
    coordinator: CoordinatorService, open_agent: Callable[..., Awaitable[Any]]
) -> None:
    api = coordinator.api
    await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=2))
    leaving = await open_agent(api, "a")
    request = pb.GetGrantsRequest(session_token=leaving.session.session_token)
    grants = list((await api.get_grants(request)).grants)
    ends = [
        pb.WalEnd(topic_id=grant.topic_id, partition=grant.partition, epoch=grant.epoch, end_offset=7)
        for grant in grants
    ]
    staying = await open_agent(api, "b")
    await api.close_session(pb.CloseSessionRequest(session_token=leaving.session.session_token, ends=ends))
    request = pb.GetGrantsRequest(session_token=staying.session.session_token)
    found = {grant.partition: grant for grant in (await api.get_grants(request)).grants}
    assert {p: (grant.start_offset, grant.status) for p, grant in found.items()} == {0: (7, "open"), 1: (7, "open")}
    assert {grant.epoch for grant in found.values()} == {2}, "nothing was granted to the one that left"


async def beat(agent: Any, log_full: bool) -> None:
    request = pb.HeartbeatRequest(session_token=agent.session.session_token, log_full=log_full)
    await agent.api.heartbeat(request)


async def moved(agent: Any) -> int:
    """Gives up what is to move, as a leader does; how much that was."""
    moving = [grant for grant in await agent.grants() if grant.status == "moving"]
    await agent.settle(*((grant, grant.start_offset) for grant in moving))
    return len(moving)


async def test_g7_partitions_of_an_agent_whose_log_is_full_go_to_others_as_long_as_there_are_any(
    coordinator: CoordinatorService, open_agent: Callable[..., Awaitable[Any]]
) -> None:
    api = coordinator.api
    await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=4))
    full = await open_agent(api, "a")
    await beat(full, True)
    assert (await moved(full), len(await full.leads())) == (0, 4), "there is nobody else"
    other = await open_agent(api, "b")
    assert await moved(full) == 4
    assert (len(await full.leads()), len(await other.leads())) == (0, 4)
    shown = (await api.get_status(pb.GetStatusRequest())).sessions
    assert {session.agent_id: session.log_full for session in shown} == {"a": True, "b": False}
    await full.heartbeat()  # without a word of it: nothing has changed
    await api.create_topic(pb.CreateTopicRequest(topic="later", partitions=2))
    assert len(await full.leads()) == 0, "new partitions are not given to it either"
    await beat(full, False)
    assert await moved(other) == 3
    assert len([grant for grant in await full.grants() if grant.status == "open"]) == 3


async def test_a_rolling_restart_leaves_no_topic_on_one_agent(
    coordinator: CoordinatorService, open_agent: Callable[..., Awaitable[Any]]
) -> None:
    """Totals were even, and all six partitions of the topic with the load were led by the same agent."""
    api = coordinator.api
    agents = [await open_agent(api, "a"), await open_agent(api, "b")]
    for name in ("hot", "quiet"):
        await api.create_topic(pb.CreateTopicRequest(topic=name, partitions=6))
    for agent in agents:  # each leaves, and comes back
        ends = [wal_end(grant) for grant in await agent.grants() if grant.status == "open"]
        token = agent.session.session_token
        await api.close_session(pb.CloseSessionRequest(session_token=token, ends=ends))
        await agent.open()
        await hand_over(agents)
    for agent in agents:
        led = Counter(grant.topic for grant in await agent.grants() if grant.status == "open")
        assert led == {"hot": 3, "quiet": 3}


async def hand_over(agents: list[Any]) -> None:
    """Until nothing is to be moved any more."""
    while True:
        moving = [(agent, grant) for agent in agents for grant in await agent.grants() if grant.status == "moving"]
        if not moving:
            return
        for agent, grant in moving:
            await agent.settle((grant, grant.start_offset))


def wal_end(grant: pb.RangeGrant) -> pb.WalEnd:
    return pb.WalEnd(
        topic_id=grant.topic_id, partition=grant.partition, epoch=grant.epoch, end_offset=grant.start_offset
    )
