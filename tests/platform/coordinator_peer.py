"""The coordinator as services reach it that follow its events, and the faults of that way.

Owns: what is held back of open event streams. Does not own: the events.
Invariants: a stream brings the coordinator's own events, in order, until it is broken.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

from shproto.errors import AWAY, Unavailable
from shproto.v1 import coordinator_pb2

from tests.platform.peer import Peer
from tests.platform.platform import Platform


class CoordinatorPeer(Peer):
    """`feed_paused`: open event streams hold back what comes. `database_away`: calls are refused for want of
    PostgreSQL, and event streams bring nothing. `wake` lets them see that a knob was turned."""

    def __init__(self, api: Any) -> None:
        super().__init__(api, "the coordinator")
        self.feed_paused = False
        self.database_away = False
        self._cuts = 0
        self._error: Exception = Unavailable("stream cut")
        self._turned = asyncio.get_running_loop().create_future()

    def wake(self) -> None:
        turned, self._turned = self._turned, self._turned.get_loop().create_future()
        turned.set_result(None)

    def cut(self, error: Exception | None = None) -> None:
        """Breaks all event streams that are open."""
        self._cuts += 1
        self._error = error or Unavailable("stream cut")
        self.wake()

    def _must_be_up(self, name: str) -> None:
        super()._must_be_up(name)
        if self.database_away and name != "follow_events":  # coordinators keep their streams
            self.refused[name] += 1
            raise Unavailable("PostgreSQL does not answer", database=AWAY)

    async def follow_events(self, request: coordinator_pb2.FollowEventsRequest) -> AsyncIterator[coordinator_pb2.Event]:
        self._must_be_up("follow_events")
        self.calls["follow_events"] += 1
        cuts = self._cuts
        # Nothing listens at the addresses of services under test: a coordinator that looks for the process behind a
        # broken stream would end its session.
        anonymous = coordinator_pb2.FollowEventsRequest()
        anonymous.CopyFrom(request)
        anonymous.ClearField("session_token")
        coming: deque[coordinator_pb2.Event] = deque()

        async def read() -> None:
            async with aclosing(self.api.follow_events(anonymous)) as events:
                async for event in events:
                    coming.append(event)
                    self.wake()

        async with background(read()) as reading:
            while True:
                while not coming or self.feed_paused or self.database_away:
                    await asyncio.wait({reading, self._turned}, return_when=asyncio.FIRST_COMPLETED)
                    if reading.done():
                        await reading  # raises why the stream ended
                    if self._cuts != cuts:
                        raise self._error
                    self._must_be_up("follow_events")
                yield coming.popleft()


@asynccontextmanager
async def background(work: Any) -> AsyncIterator[asyncio.Future[Any]]:
    """Runs `work` while the block runs."""
    task = asyncio.ensure_future(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task})


@asynccontextmanager
async def feeding(platform: Platform) -> AsyncIterator[None]:
    """Runs the feed alone of the coordinator's background work: nothing happens to sessions and leadership by
    itself."""
    async with background(platform.service.feed.run()):
        yield
