"""Bytes that a subscription reads ahead, taken of several budgets."""

import asyncio

import pytest
from shread.subscribe import BudgetReservation
from shruntime.byte_budget import ByteBudget, ConnectionBudgets

pytestmark = pytest.mark.quick


async def test_g7_what_is_read_ahead_is_limited_by_connection() -> None:
    budgets = ConnectionBudgets(100)
    with budgets.budget("a") as first, budgets.budget("a") as second, budgets.budget("b") as other:
        assert first is second and first is not other
        own = ByteBudget(80)
        reservation = await BudgetReservation.reserve((first, own), 70)
        waiting = asyncio.create_task(BudgetReservation.reserve((second, ByteBudget(80)), 60))
        await asyncio.sleep(0)
        assert not waiting.done(), "of another subscription on the connection"
        reservation.release(keep_bytes=40)
        rest = await waiting
        reservation.release()
        rest.release()
        assert (first._free, own._free) == (100, 80)
    with budgets.budget("") as one, budgets.budget("") as another:
        assert one is not another
    assert not budgets._budgets


async def test_a_loan_that_is_given_up_in_between_gives_back_what_it_had() -> None:
    first, second = ByteBudget(100), ByteBudget(100)
    held = await second.take(100)
    taking = asyncio.create_task(BudgetReservation.reserve((first, second), 50))
    await asyncio.sleep(0)
    assert first._free == 50
    taking.cancel()
    await asyncio.gather(taking, return_exceptions=True)
    second.give_back(held)
    assert (first._free, second._free) == (100, 100)
