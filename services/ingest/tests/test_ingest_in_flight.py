"""What one connection may have unanswered."""

import asyncio
import contextlib

import pytest
from shproto.errors import Overloaded
from streamhouse_ingest.produce.in_flight import ConnectionByteLimit

pytestmark = pytest.mark.quick


def test_a_connection_is_refused_beyond_its_limit_and_no_other_is() -> None:
    in_flight = ConnectionByteLimit(100)
    with contextlib.ExitStack() as held:
        held.enter_context(in_flight.hold("a", 60))
        held.enter_context(in_flight.hold("a", 40))
        with pytest.raises(Overloaded) as refused, in_flight.hold("a", 1):
            pass
        assert refused.value.details["limit"] == "connection_bytes_in_flight_max"
        assert refused.value.details["value"] == "100"
        assert refused.value.retry_after_ms > 0
        held.enter_context(in_flight.hold("b", 100))
        held.enter_context(in_flight.hold("", 1_000))
        held.enter_context(in_flight.hold("", 1_000))  # in this process: services of our own
    with in_flight.hold("a", 500):  # of any size, alone
        pass
    assert not in_flight._budgets._budgets


async def test_a_stream_waits_for_room() -> None:
    in_flight = ConnectionByteLimit(100)
    await in_flight.take("a", 90)
    large, small, given_up = (asyncio.create_task(in_flight.take("a", size)) for size in (50, 20, 30))
    await asyncio.sleep(0)
    assert not (large.done() or small.done())
    given_up.cancel()
    await in_flight.take("b", 90)
    in_flight.give_back("a", 90)
    await asyncio.gather(large, small)
    for size in (50, 20):
        in_flight.give_back("a", size)
    in_flight.give_back("b", 90)
    assert not in_flight._budgets._budgets


async def test_a_large_request_is_not_passed_over_for_small_ones() -> None:
    """It waited for as long as others kept what was free too little for it."""
    in_flight = ConnectionByteLimit(100)
    await in_flight.take("a", 60)
    large = asyncio.create_task(in_flight.take("a", 80))
    await asyncio.sleep(0)
    small = asyncio.create_task(in_flight.take("a", 30))
    await asyncio.sleep(0)
    assert not (large.done() or small.done())
    with pytest.raises(Overloaded), in_flight.hold("a", 30):
        pass
    in_flight.give_back("a", 60)
    await large
    assert not small.done()
    in_flight.give_back("a", 80)
    await small
    in_flight.give_back("a", 30)
    assert not in_flight._budgets._budgets


async def test_a_wait_that_is_given_up_leaves_nothing() -> None:
    in_flight = ConnectionByteLimit(100)
    await in_flight.take("a", 100)
    waiting = asyncio.create_task(in_flight.take("a", 1))
    await asyncio.sleep(0)
    in_flight.give_back("a", 100)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert not in_flight._budgets._budgets
