"""A consumer group after the faults: in bounded time it has committed all there is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from shproto.errors import StreamHouseError
from shproto.services import CoordinatorClient
from shproto.v1 import coordinator_pb2
from streamhouse import Admin

from tests.faults import history as h
from tests.simulation.applications import Where
from tests.simulation.clients import GROUP
from tests.simulation.history import History, RecordingConnection
from tests.simulation.nodes import RPC_TIMEOUT_MS, SimContext

POLL_S = 0.5


class GroupEnding:
    """`ends`: where the partitions end. `blame(kind, text)`: what is not as it should be."""

    def __init__(
        self, context: SimContext, history: History, ends: Mapping[Where, int], blame: Callable[[str, str], None]
    ) -> None:
        self._context = context
        self._history = history
        self._ends = ends
        self._blame = blame

    async def run(self, deadline: float) -> None:
        """Returns when the group is at the end of every partition, as commits and as lag; or blames it."""
        why = await self._behind()
        while why and self._context.loop.time() < deadline:
            await asyncio.sleep(POLL_S)
            why = await self._behind()
        if why:
            self._blame("group-behind", why)

    async def _behind(self) -> str:
        try:
            committed = await self._committed()
            lags = await self._lags()
        except StreamHouseError as error:
            return f"{error.reason}: {error.message}"
        behind = {where: at for where, at in committed.items() if at < self._ends[where]}
        if behind or any(lag != 0 for lag in lags.values()) or lags.keys() != self._ends.keys():
            return f"committed {committed}, lag {lags}, the ends are {dict(self._ends)}"
        for where, offset in committed.items():
            self._history.write(h.Position("members", *where, offset, group=GROUP))
        return ""

    async def _committed(self) -> dict[Where, int]:
        """As the history records it. Raises StreamHouseError."""
        context = self._context
        connection = RecordingConnection(context.network, self._history, context.bootstrap, timeout_ms=RPC_TIMEOUT_MS)
        partitions = [coordinator_pb2.TopicPartition(topic=topic, partition=number) for topic, number in self._ends]
        request = coordinator_pb2.FetchOffsetsRequest(group=GROUP, partitions=partitions)
        answer = await CoordinatorClient(connection).fetch_offsets(request)
        return {(item.topic, item.partition): item.offset for item in answer.offsets}

    async def _lags(self) -> dict[Where, int | None]:
        """As an operator sees them. Raises StreamHouseError."""
        bootstrap, timeout_ms = self._context.bootstrap, RPC_TIMEOUT_MS
        async with Admin(bootstrap, request_timeout_ms=timeout_ms, retry_timeout_ms=timeout_ms) as admin:
            description = await admin.describe_group(GROUP)
        return {(item.topic, item.partition): item.lag for item in description.positions}
