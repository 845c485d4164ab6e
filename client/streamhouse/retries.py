"""Repeats unanswered calls for as long as the application's options allow.

Owns: the notice of an outage in the log. Does not own: connections, the calls.
Invariants: a refusal is never repeated. A single notice is logged after NOTICE_AFTER_MS without an answered call,
however many calls wait, and no second notice before the next answer. Calls that wait while others are answered cause no
notice.
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

# A restart within this time is not worth a notice.
NOTICE_AFTER_MS = 1_000


class Retries:
    """Calls of a client, repeated until answered or until `timeout_ms`, the value of `option`, is over. `bootstrap` is
    for error messages."""

    def __init__(self, option: str, timeout_ms: int, bootstrap: Sequence[str]) -> None:
        self._option = option
        self._timeout_ms = timeout_ms
        self._bootstrap = ",".join(bootstrap)
        self._is_reported = False
        self._answered_s = -math.inf  # when a call was last answered, on the event loop's clock

    async def run(self, call: Callable[[], Awaitable[T]], *, repeatable: bool = True) -> T:
        """Returns the answer of `call()`. Raises its refusals at once, and its last failure when the time is over.

        repeatable False: doing the call twice differs from doing it once, so that only calls that certainly had no
        effect are repeated.
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
                    raise  # a TimeoutError of the call itself
                raise self._exhausted(last) from error
            except StreamHouseError as error:
                if not _may_repeat(error, repeatable):
                    raise
                last = error
            else:
                self._answered()
                return answer
            # The sum, not the larger: calls that were refused together must not come back together.
            wait_s = (last.retry_after_ms + backoff.next_ms()) / 1000
            if loop.time() + wait_s >= deadline_s:
                raise self._exhausted(last) from last
            self._notice(last, loop.time() - max(begun_s, self._answered_s))
            await asyncio.sleep(wait_s)

    def over(self, connection: Caller) -> Caller:
        """Returns a connection that repeats unary calls and the beginnings of streams."""
        return RetryingConnection(connection, self)

    def _notice(self, error: StreamHouseError, silent_s: float) -> None:
        if not self._is_reported and silent_s * 1000 >= NOTICE_AFTER_MS:
            self._is_reported = True
            log.warning("no answer yet, trying again for %s = %d: %s", self._option, self._timeout_ms, error)

    def _answered(self) -> None:
        self._answered_s = asyncio.get_running_loop().time()
        if self._is_reported:
            self._is_reported = False
            log.info("%s answers", self._bootstrap)

    def _exhausted(self, last: StreamHouseError | None) -> StreamHouseError:
        return retries_exhausted(f"no answer from {self._bootstrap}", self._option, self._timeout_ms, last)


def retries_exhausted(what: str, option: str, timeout_ms: int, last: StreamHouseError | None) -> StreamHouseError:
    """Returns the error of a call that was tried for all the time that an option allows: of the kind of its last
    failure and with the same details; Unavailable if nothing had failed. `what`: beginning of the message."""
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


# Repeated after a lost answer, these would fail: the topic exists already, or no longer.
_NOT_REPEATABLE = ("/CreateTopic", "/DeleteTopic", "/DeleteGroup")


class RetryingConnection:
    """A connection that repeats unary calls and the beginnings of streams."""

    def __init__(self, connection: Caller, retries: Retries) -> None:
        self._connection = connection
        self._retries = retries

    async def unary(self, path: str, request: Message, response_type: type[ResponseT]) -> ResponseT:
        """Returns the answer. Raises as `Retries.run` does."""
        return await self._retries.run(
            lambda: self._connection.unary(path, request, response_type),
            repeatable=not path.endswith(_NOT_REPEATABLE),
        )

    async def unary_stream(
        self, path: str, request: Message, response_type: type[ResponseT]
    ) -> AsyncIterator[ResponseT]:
        """Yields the answers. Raises as `Retries.run` does until the first answer; after that the errors of the
        stream."""

        # The first answer is awaited inside the repeated call: until then the caller has seen nothing of the stream, so
        # that another stream may take its place.
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
        """Yields the answers, without repeating: requests taken from the iterator cannot be sent again."""
        return self._connection.stream_stream(path, requests, response_type)

    async def close(self) -> None:
        """Closes the connection."""
        await self._connection.close()
