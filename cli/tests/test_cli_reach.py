"""Services whose address does not work from here: `produce` and `consume` say so soon, and name the setting."""

import asyncio

import pytest
from streamhouse import errors
from streamhouse_cli import reach
from streamhouse_cli.reach import reach_leaders, reach_readers

NOBODY = "no-such-host.invalid:7070"
NAMES_IT = r"cannot connect to no-such-host\.invalid:7070: .*; the service advertises this address: .*ADVERTISE"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(reach, "retry_timeout_ms", lambda: 300)
    monkeypatch.setattr(reach, "LOOK_AGAIN_S", 0.02)
    monkeypatch.setattr(reach, "RENEWED_S", 0.1)


def advertise_sessions(platform, left_s):
    """Has GetStatus name NOBODY as the address of all agents; their sessions end in `left_s()`."""

    def change(request, answer):
        for session in answer.sessions:
            if session.role == "ingest":
                session.address, session.expires_in_ms = NOBODY, int(left_s() * 1000)

    platform.faults.change("get_status", change)


async def test_services_at_their_addresses_are_no_news(address, platform):
    await platform.create_topic("t", 3)
    await reach_leaders(address, "t")
    await reach_readers(address, "t")


async def test_a_topic_that_is_not_there_is_said_at_once(address):
    for reaching in (reach_leaders, reach_readers):
        with pytest.raises(errors.UnknownTopic):
            await reaching(address, "t")


async def test_a_leader_that_is_alive_and_cannot_be_reached_is_an_error_that_names_address_and_setting(
    address, platform
):
    await platform.create_topic("t", 1)
    platform.advertise(leader=NOBODY)
    advertise_sessions(platform, lambda: 30.0)  # renewed all the time
    with pytest.raises(errors.Unavailable, match=NAMES_IT):
        await reach_leaders(address, "t")


async def test_a_leader_that_may_be_dead_is_waited_for_until_another_leads(address, platform):
    """Its session is not renewed: it will end, and another agent takes over."""
    await platform.create_topic("t", 1)
    platform.advertise(leader=NOBODY)
    loop = asyncio.get_running_loop()
    ends_s = loop.time() + 3600
    advertise_sessions(platform, lambda: ends_s - loop.time())
    reaching = asyncio.create_task(reach_leaders(address, "t"))
    asked = platform.faults.calls["get_metadata"]
    while platform.faults.calls["get_metadata"] < asked + 30:  # past --retry-timeout-ms
        await asyncio.sleep(0.01)
    assert not reaching.done()
    platform.faults.mend("get_metadata")
    await reaching


async def test_no_leader_at_the_moment_is_left_to_the_producer(address, platform):
    await platform.create_topic("t", 1)
    platform.advertise(leader="")
    await reach_leaders(address, "t")


async def test_a_query_service_that_cannot_be_reached_is_an_error_that_names_address_and_setting(address, platform):
    await platform.create_topic("t", 1)
    platform.advertise(readers=[NOBODY])
    with pytest.raises(errors.Unavailable, match=NAMES_IT):
        await reach_readers(address, "t")
