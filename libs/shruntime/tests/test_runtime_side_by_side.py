"""Coroutines side by side: the first end is the end of all."""

import asyncio

import pytest
from shruntime.tasks import run_until_first_ends

pytestmark = pytest.mark.quick


async def for_ever(ended: list[str]) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        await asyncio.sleep(0)
        ended.append("cancelled")


async def test_the_first_that_ends_ends_the_others() -> None:
    ended: list[str] = []
    await run_until_first_ends({"short": asyncio.sleep(0), "long": for_ever(ended), "longer": for_ever(ended)})
    assert ended == ["cancelled", "cancelled"]


async def test_what_the_first_raises_is_raised_when_the_others_have_ended() -> None:
    ended: list[str] = []

    async def fail() -> None:
        await asyncio.sleep(0)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await run_until_first_ends({"failing": fail(), "long": for_ever(ended)})
    assert ended == ["cancelled"]


async def test_a_cancellation_ends_all() -> None:
    ended: list[str] = []
    running = asyncio.create_task(run_until_first_ends({"one": for_ever(ended), "other": for_ever(ended)}))
    await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert ended == ["cancelled", "cancelled"]
