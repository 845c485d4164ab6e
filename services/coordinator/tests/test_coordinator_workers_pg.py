"""What a segmenter has claimed is free at once when its process is gone, or begins anew: its partitions' durable
acknowledgements must not wait for the claims to run out."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from shproto.errors import AgentIdTaken, Fenced
from shproto.v1 import coordinator_pb2 as pb
from shproto.v1 import types_pb2
from streamhouse_coordinator.api import CoordinatorApi
from streamhouse_coordinator.wiring import CoordinatorService

pytestmark = pytest.mark.long

HOUR_MS = 3_600_000
ChangeRows = Callable[..., Awaitable[object]]
MakeSegment = Callable[..., types_pb2.SegmentRef]


@pytest.fixture
async def api(coordinator: CoordinatorService) -> CoordinatorApi:
    await coordinator.api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=1))
    return coordinator.api


async def open_worker(api: CoordinatorApi, name: str, address: str = "127.0.0.1:1") -> str:
    """The session's token."""
    request = pb.OpenSessionRequest(agent_id=name, role="segmenter", address=address)
    return (await api.open_session(request)).session_token


async def claim(api: CoordinatorApi, worker: str) -> str:
    """The claim's id, empty if there was nothing to claim."""
    request = pb.ClaimBufferRequest(worker_id=worker, claim_ttl_ms=HOUR_MS // 10)
    return (await api.claim_buffer(request)).claim_id


async def announced(api: CoordinatorApi, open_agent: Any) -> None:
    agent = await open_agent(api, "a")
    await agent.announce(((await agent.leads())[0], 0, 10))


async def test_a_worker_that_opens_its_session_ends_its_own_old_claims(api: CoordinatorApi, open_agent: Any) -> None:
    await announced(api, open_agent)
    await open_worker(api, "w")
    held = await claim(api, "w")
    assert held and not await claim(api, "other")
    await open_worker(api, "another")
    assert not await claim(api, "other"), "another's session is nothing to it"
    await open_worker(api, "w")
    again = await claim(api, "other")
    assert again
    with pytest.raises(Fenced):
        await api.renew_claim(pb.RenewClaimRequest(claim_id=held, claim_ttl_ms=1000))
    await api.renew_claim(pb.RenewClaimRequest(claim_id=again, claim_ttl_ms=1000))


@pytest.mark.parametrize("how", ["closed", "expired", "unreachable"])
async def test_the_claims_of_a_worker_end_with_its_session(
    api: CoordinatorApi, open_agent: Any, change_rows: ChangeRows, how: str
) -> None:
    await announced(api, open_agent)
    token = await open_worker(api, "w")  # nobody listens at its address
    assert await claim(api, "w") and not await claim(api, "other")
    if how == "closed":
        await api.close_session(pb.CloseSessionRequest(session_token=token))
    elif how == "expired":
        await change_rows("UPDATE session_leases SET expires_ms = 1 WHERE session_id IN "
                          "(SELECT session_id FROM sessions WHERE role = 'segmenter')")  # fmt: skip
    else:
        stream = api.follow_events(pb.FollowEventsRequest(after_position=0, session_token=token))
        await anext(aiter(stream))
        await stream.aclose()  # type: ignore[attr-defined]
    async with asyncio.timeout(30):
        while not await claim(api, "other"):
            await asyncio.sleep(0.02)
    buffers = (await api.get_status(pb.GetStatusRequest())).buffers_claimed
    assert buffers == 1


async def test_a_compaction_of_a_worker_that_is_gone_is_free_too(
    api: CoordinatorApi, open_agent: Any, make_segment: MakeSegment
) -> None:
    agent = await open_agent(api, "a")
    grant = (await agent.leads())[0]
    for base in range(0, 40, 10):
        await agent.write(grant, base, base + 10)
    request = pb.ClaimCompactionRequest(
        worker_id="w", claim_ttl_ms=HOUR_MS // 10, small_bytes_max=1000, target_bytes=10_000, segments_min=4
    )
    token = await open_worker(api, "w")
    assert (await api.claim_compaction(request)).found and not (await api.claim_compaction(request)).found
    await api.close_session(pb.CloseSessionRequest(session_token=token))
    assert (await api.claim_compaction(request)).found


async def test_a_buffer_that_waits_for_its_next_try_goes_on_waiting(api: CoordinatorApi, open_agent: Any) -> None:
    await announced(api, open_agent)
    await open_worker(api, "w")
    held = await claim(api, "w")
    await api.release_claim(pb.ReleaseClaimRequest(claim_id=held, reason="store", retry_after_ms=HOUR_MS // 10))
    await open_worker(api, "w")
    assert not await claim(api, "other")


@pytest.mark.smoke
async def test_two_live_workers_do_not_take_each_others_claims(api: CoordinatorApi, open_agent: Any) -> None:
    """The same worker_id twice, by mistake: each would end the other's claims for ever."""
    await announced(api, open_agent)
    listening = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    host, port = listening.sockets[0].getsockname()
    await open_worker(api, "w", f"{host}:{port}")
    held = await claim(api, "w")
    with pytest.raises(AgentIdTaken, match=r"give this one another id \(STREAMHOUSE_WORKER_ID\)"):
        await open_worker(api, "w", "127.0.0.1:2")
    await api.renew_claim(pb.RenewClaimRequest(claim_id=held, claim_ttl_ms=1000))
    listening.close()
    await listening.wait_closed()
    await open_worker(api, "w", "127.0.0.1:2")
    with pytest.raises(Fenced):
        await api.renew_claim(pb.RenewClaimRequest(claim_id=held, claim_ttl_ms=1000))
