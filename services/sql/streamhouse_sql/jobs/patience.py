"""Calls of jobs that are asked again for as long as a later try may succeed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from shproto.errors import StreamHouseError
from shproto.limits import RETRY_FIRST_MS, RETRY_MS_MAX
from shruntime.tasks import Backoff, retry

T = TypeVar("T")


async def until_available(call: Callable[[], Awaitable[T]], note: Callable[[StreamHouseError], None]) -> T:
    """Returns the result of a call, which is asked again without a limit of time: a job waits for what it needs.
    `note` is called with each error that a later try may mend. Raises the others."""

    def is_final(error: StreamHouseError) -> bool:
        if error.retriable:
            note(error)
        return not error.retriable

    return await retry(call, Backoff(RETRY_FIRST_MS, RETRY_MS_MAX), is_final)
