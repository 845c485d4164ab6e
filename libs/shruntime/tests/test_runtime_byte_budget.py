"""A budget of bytes: nobody is passed over, and nothing is lost by who gives up."""

import asyncio

import pytest
from shruntime.byte_budget import ByteBudget

pytestmark = pytest.mark.quick


async def settled() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def test_who_comes_first_is_served_first() -> None:
    budget = ByteBudget(100)
    assert budget.try_take(90) == 90
    large, small = asyncio.create_task(budget.take(50)), asyncio.create_task(budget.take(5))
    await settled()
    assert budget.try_take(5) is None, "two wait already"
    assert not small.done(), "it would fit, but the large one came first"
    budget.give_back(90)
    assert await asyncio.gather(large, small) == [50, 5]
    assert budget.lent_bytes == 55


async def test_more_than_there_is_waits_for_all_and_gets_that() -> None:
    budget = ByteBudget(100)
    assert budget.try_take(1) == 1
    all_of_it = asyncio.create_task(budget.take(500))
    await settled()
    assert not all_of_it.done()
    budget.give_back(1)
    assert await all_of_it == 100
    budget.give_back(100)
    assert budget.try_take(500) == 100


async def test_who_gives_up_first_in_line_lets_the_next_one_have_its_turn() -> None:
    budget = ByteBudget(100)
    budget.try_take(90)
    large, small = asyncio.create_task(budget.take(50)), asyncio.create_task(budget.take(5))
    await settled()
    large.cancel()
    assert await small == 5
    await asyncio.gather(large, return_exceptions=True)
    assert budget.lent_bytes == 95


async def test_a_turn_that_comes_with_a_cancellation_is_given_back() -> None:
    budget = ByteBudget(100)
    budget.try_take(100)
    taking = asyncio.create_task(budget.take(60))
    await settled()
    budget.give_back(100)
    taking.cancel()
    await asyncio.gather(taking, return_exceptions=True)
    assert budget.lent_bytes == 0


async def test_the_byte_budget_is_first_come_first_served_and_survives_cancellation() -> None:
    budget = ByteBudget(100)
    assert await budget.take(1_000) == 100
    order: list[int] = []

    async def taker(number: int, size_bytes: int) -> None:
        order.append(number if await budget.take(size_bytes) == size_bytes else -1)

    tasks = [asyncio.create_task(taker(n, size)) for n, size in enumerate([60, 60, 10, 10])]
    await asyncio.sleep(0)
    tasks[1].cancel()
    budget.give_back(100)
    tasks[2].cancel()  # its turn has come, it has not run yet
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == [0, 3]
    budget.give_back(70)
    assert await budget.take(100) == 100
