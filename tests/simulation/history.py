"""What clients did and saw, in memory and in virtual time, as the checker of tests/faults judges it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

from google.protobuf.message import Message
from shproto.v1 import coordinator_pb2

from tests.faults import history as h
from tests.simulation.connection import SimConnection
from tests.simulation.loop import PROCESS
from tests.simulation.network import Network


class History:
    """tests.faults.history.Recorder, without a file."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._ids = count(1)
        self.events: list[h.Event] = []

    def new_id(self) -> int:
        return next(self._ids)

    def write(self, event: h.Event) -> None:
        object.__setattr__(event, "at_ms", int(self._now_s() * 1000))
        self.events.append(event)


class RecordingConnection(SimConnection):
    """The SDK's: whatever it commits for a group, or asks of its commits, is in the history, automatic commits
    included."""

    def __init__(
        self,
        network: Network,
        history: History,
        addresses: Sequence[str],
        *,
        timeout_ms: int = 10_000,
        interceptors: object = None,
        advertised: bool = False,
    ) -> None:
        super().__init__(network, addresses, timeout_ms=timeout_ms, interceptors=interceptors, advertised=advertised)
        self._history = history

    async def unary(self, path: str, request: Message, response_type: type[Any]) -> Any:
        if isinstance(request, coordinator_pb2.CommitOffsetsRequest):
            return await self._commit(path, request, response_type)
        if isinstance(request, coordinator_pb2.FetchOffsetsRequest) and request.partitions:
            return await self._fetch_committed(path, request, response_type)
        return await super().unary(path, request, response_type)

    async def _commit(self, path: str, request: coordinator_pb2.CommitOffsetsRequest, response_type: type[Any]) -> Any:
        """A refusal may come from the second coordinator that was asked, after the first has stored the commit and
        could not say so: whatever is no success is unknown."""
        history, process = self._history, PROCESS.get().name
        commits = [
            h.Commit(history.new_id(), process, request.group, item.topic, item.partition, item.offset)
            for item in request.offsets
        ]
        for commit in commits:
            history.write(commit)
        outcome = "unknown"
        try:
            response = await super().unary(path, request, response_type)
            outcome = "ok"
            return response
        finally:
            for commit in commits:
                history.write(h.CommitDone(commit.id, outcome))

    async def _fetch_committed(
        self, path: str, request: coordinator_pb2.FetchOffsetsRequest, response_type: type[Any]
    ) -> Any:
        history, process = self._history, PROCESS.get().name
        fetches = [
            h.FetchCommitted(history.new_id(), process, request.group, item.topic, item.partition)
            for item in request.partitions
        ]
        for fetch in fetches:
            history.write(fetch)
        response = await super().unary(path, request, response_type)
        found = {(item.topic, item.partition): item.offset for item in response.offsets}
        for fetch in fetches:
            history.write(h.Committed(fetch.id, found.get((fetch.topic, fetch.partition), -1)))
        return response
