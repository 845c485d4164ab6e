"""Ends of tasks, and retries with back-off."""

import asyncio

import pytest
from shproto.errors import InvalidArgument, StreamHouseError, Unavailable
from shruntime.tasks import Backoff, cancel_and_wait, outcomes, retry


async def test_cancel_and_wait_returns_once_all_have_ended_and_hides_their_errors() -> None:
    ended: list[str] = []

    async def cleans_up() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)  # takes a turn of the loop, as closing a connection does
            ended.append("cleaned up")

    async def fails() -> None:
        raise ValueError("a defect")

    done = asyncio.create_task(asyncio.sleep(0, "a result"))
    running, failing = asyncio.create_task(cleans_up()), asyncio.create_task(fails())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await cancel_and_wait(running, failing, done)
    assert ended == ["cleaned up"] and running.cancelled()
    assert isinstance(failing.exception(), ValueError) and done.result() == "a result"
    await cancel_and_wait()


async def test_a_caller_that_is_cancelled_waits_for_the_tasks_all_the_same() -> None:
    may_end = asyncio.Event()

    async def ends_late() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            while not may_end.is_set():
                try:
                    await may_end.wait()
                except asyncio.CancelledError:  # a second cancellation, as gather passes it on
                    continue

    task = asyncio.create_task(ends_late())
    await asyncio.sleep(0)
    stopping = asyncio.create_task(cancel_and_wait(task))
    await asyncio.sleep(0)
    stopping.cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not stopping.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert task.done()


async def test_outcomes_are_results_and_errors_in_order() -> None:
    async def fails() -> int:
        raise ValueError("no")

    first, second = await outcomes(fails(), asyncio.sleep(0, 2))
    assert isinstance(first, ValueError) and second == 2


class Calls:
    """A call that fails with these errors, one after the other, and then returns its number."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.count = 0

    async def __call__(self) -> int:
        self.count += 1
        if self.errors:
            raise self.errors.pop(0)
        return self.count


async def test_retry_calls_until_a_call_succeeds_and_waits_as_the_backoff_says() -> None:
    waits: list[float] = []

    async def sleep_ms(duration_ms: float) -> None:
        waits.append(duration_ms)

    seen: list[str] = []

    def until(error: StreamHouseError) -> bool:
        seen.append(error.message)
        return False

    call = Calls(Unavailable("first"), InvalidArgument("second"))
    assert await retry(call, Backoff(100, 1_000), until, sleep_ms) == 3
    assert seen == ["first", "second"]
    assert len(waits) == 2 and 0 <= waits[0] <= 100 and 0 <= waits[1] <= 200


async def test_retry_raises_the_failure_that_ends_it_and_errors_of_other_kinds() -> None:
    refused = InvalidArgument("refused")
    call = Calls(Unavailable("away"), refused)
    with pytest.raises(InvalidArgument) as raised:
        await retry(call, Backoff(1, 1), lambda error: not error.retriable)
    assert raised.value is refused and call.count == 2
    defect = Calls(KeyError("defect"))
    with pytest.raises(KeyError):
        await retry(defect, Backoff(1, 1), lambda _: False)
    assert defect.count == 1
