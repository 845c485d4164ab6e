"""Repeats calls that nobody answers, for as long as the application's options allow.

Owns: whether the application has been told that nobody answers. Does not own: connections, which calls there are.
Invariants: a refusal is never repeated. One notice is logged once no call has been answered for NOTICE_AFTER_MS,
however many wait, and no second one before the next answer; calls that wait behind others that are answered are no
news.
"""

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import TypeVar, cast

from google.protobuf.message import Message
from shproto.errors import Overloaded, StreamHouseError, Unavailable
from shproto.limits import RETRY_FIRST_MS, RETRY_MS_MAX
from shproto.rpc import Caller
from shruntime.tasks import Backoff

log = logging.getLogger(__name__)

T = TypeVar("T")
ResponseT = TypeVar("ResponseT", bound=Message)

# A restart that takes no longer than this is no news.
NOTICE_AFTER_MS = 1_000


class Retries:
    """Calls of one client, repeated until they are answered or `timeout_ms`, the value of `option`, are over.
    `bootstrap` is for error messages."""

    def __init__(self, option: str, timeout_ms: int, bootstrap: Sequence[str]) -> None:
        self._option = option
        self._timeout_ms = timeout_ms
        self._bootstrap = ",".join(bootstrap)
        self._told = False
        self._answered_s = -math.inf  # when a call was last answered, of the event loop's clock

    async def run(self, call: Callable[[], Awaitable[T]], *, repeatable: bool = True) -> T:
        """Returns what `call()` answers. Raises its refusals at once, and its last failure when the time is over.

        Not `repeatable`: doing it twice is not the same as once, so only what certainly did nothing is repeated.
        """
        loop = asyncio.get_running_loop()
        begun_s, backoff, last = loop.time(), Backoff(RETRY_FIRST_MS, RETRY_MS_MAX), None
        deadline_s = begun_s + self._timeout_ms / 1000
        while True:
            try:
                async with asyncio.timeout_at(deadline_s) as timeout:
                    answer = await call()
            except TimeoutError as error:
                if not timeout.expired():
                    raise
                raise self._gave_up(last) from error
            except StreamHouseError as error:
                if not _may_repeat(error, repeatable):
                    raise
                last = error
            else:
                self._answered()
                return answer
            # Their sum, not the larger: calls that were refused together must not come again together.
            wait_s = (last.retry_after_ms + backoff.next_ms()) / 1000
            if loop.time() + wait_s >= deadline_s:
                raise self._gave_up(last) from last
            self._notice(last, loop.time() - max(begun_s, self._answered_s))
            await asyncio.sleep(wait_s)

    def over(self, connection: Caller) -> Caller:
        """Returns the connection with its unary calls, and the beginnings of its streams, repeated."""
        return RetryingConnection(connection, self)

    def _notice(self, error: StreamHouseError, silent_s: float) -> None:
        if not self._told and silent_s * 1000 >= NOTICE_AFTER_MS:
            self._told = True
            log.warning("no answer yet, trying again for %s = %d: %s", self._option, self._timeout_ms, error)

    def _answered(self) -> None:
        self._answered_s = asyncio.get_running_loop().time()
        if self._told:
            self._told = False
            log.info("%s answers", self._bootstrap)

    def _gave_up(self, last: StreamHouseError | None) -> StreamHouseError:
        return gave_up(f"no answer from {self._bootstrap}", self._option, self._timeout_ms, last)


def gave_up(what: str, option: str, timeout_ms: int, last: StreamHouseError | None) -> StreamHouseError:
    """Returns the error of a try that took all the time that an option allows: of the kind of its last failure, with
    that one's details; Unavailable if nothing had failed. `what`: the beginning of its message."""
    waited = f"{what} within {option} = {timeout_ms}"
    if last is None:
        return Unavailable(waited, limit=option)
    error = type(last)(f"{waited}; last error: {last.message}", retry_after_ms=last.retry_after_ms)
    error.details = dict(last.details)
    if isinstance(error, Unavailable) and isinstance(last, Unavailable):
        error.maybe_done, error.permanent = last.maybe_done, last.permanent
    return error


def _may_repeat(error: StreamHouseError, repeatable: bool) -> bool:
    if isinstance(error, Unavailable):
        return not error.permanent and (repeatable or not error.maybe_done)
    return error.retriable and (repeatable or isinstance(error, Overloaded))


# Repeated after an answer that got lost, they would be told that there is such a topic already, or none any more.
_NOT_REPEATABLE = ("/CreateTopic", "/DeleteTopic", "/DeleteGroup")


class RetryingConnection:
    """A connection whose unary calls, and the beginnings of its streams, are repeated."""

    def __init__(self, connection: Caller, retries: Retries) -> None:
        self._connection = connection
        self._retries = retries

    async def unary(self, path: str, request: Message, response_type: type[ResponseT]) -> ResponseT:
        """Returns the answer. Raises what `Retries.run` raises."""
        return await self._retries.run(
            lambda: self._connection.unary(path, request, response_type),
            repeatable=not path.endswith(_NOT_REPEATABLE),
        )

    async def unary_stream(
        self, path: str, request: Message, response_type: type[ResponseT]
    ) -> AsyncIterator[ResponseT]:
        """Yields the answers. Raises what `Retries.run` raises, until there is a first one."""

        async def begin() -> tuple[AsyncIterator[ResponseT], ResponseT | None]:
            stream = self._connection.unary_stream(path, request, response_type)
            return stream, await anext(stream, None)

        stream, first = await self._retries.run(begin)
        async with aclosing(cast("AsyncGenerator[ResponseT, None]", stream)) as responses:
            if first is not None:
                yield first
                async for response in responses:
                    yield response

    def stream_stream(
        self, path: str, requests: AsyncIterator[Message], response_type: type[ResponseT]
    ) -> AsyncIterator[ResponseT]:
        """Yields the answers; requests that were taken once cannot be sent again."""
        return self._connection.stream_stream(path, requests, response_type)

    async def close(self) -> None:
        """Closes the connection."""
        await self._connection.close()
