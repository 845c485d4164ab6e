"""An agent that leaves in good order: its partitions go on elsewhere, right where it ended."""

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
