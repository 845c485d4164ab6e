"""After the faults: everything is registered, readable and swept in bounded time, and the history is complete."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from shproto.errors import StreamHouseError
from shproto.services import CoordinatorClient, QueryClient
from shproto.v1 import coordinator_pb2, query_pb2

from tests.faults import history as h
from tests.simulation.crowd import Crowd
from tests.simulation.group_ending import GroupEnding
from tests.simulation.history import History
from tests.simulation.nodes import IngestNode, Node, QueryNode, SimContext
from tests.simulation.workload import READ_BYTES, Target, records_of

SETTLE_S = 90.0
"""How long everything may take to be registered and swept after healing: the orphans' grace is 4 s of it."""
POLL_S = 0.5

Snapshot = dict[tuple[str, int], Any]
"""What the coordinator says of each (topic, partition)."""


class Ending:
    """`blame(kind, text)`: what is not as it should be."""

    def __init__(
        self,
        context: SimContext,
        nodes: Sequence[Node],
        targets: Sequence[Target],
        crowd: Crowd,
        history: History,
        blame: Callable[[str, str], None],
    ) -> None:
        self._context = context
        self._loop = context.loop
        self._nodes = nodes
        self._targets = targets
        self._crowd = crowd
        self._history = history
        self._blame = blame
        self._ends: dict[tuple[str, int], int] = {}
        self._read_to: dict[tuple[str, str, int], int] = {}

    async def run(self) -> None:
        """Returns when all is proven, or blames what is not."""
        deadline = self._loop.time() + SETTLE_S
        self._crowd.skip_think_time()
        while True:
            snapshot = await self._registered(deadline)
            if snapshot is None or not await self._read_everything(deadline, snapshot):
                return
            snapshot = await self._swept(deadline, snapshot)
            if not self._has_grown(snapshot):
                break  # else a write came in so late that its client had given it up before we began
        self._record(snapshot)
        while self._behind() and self._loop.time() < deadline:
            await asyncio.sleep(POLL_S)
        for reader in self._crowd.readers:
            for where, offset in reader.positions().items():
                self._history.write(h.Position(reader.reader, *where, offset))
        if self._crowd.has_group:
            await GroupEnding(self._context, self._history, self._ends, self._blame).run(deadline)
        self._history.write(h.End())

    def _has_grown(self, snapshot: Snapshot) -> bool:
        return any(_end_of(part) > self._ends[where] for where, part in snapshot.items())

    def _behind(self) -> bool:
        """There is one reader per partition, or one of all; while it has no consumer it is nowhere."""
        positions = {where: at for reader in self._crowd.readers for where, at in reader.positions().items()}
        return any(positions.get(where, -1) < end for where, end in self._ends.items())

    async def _registered(self, deadline: float) -> Snapshot | None:
        """The metadata once nothing is unregistered; None if that never comes."""
        why = ["nothing was asked yet"]
        while self._loop.time() < deadline:
            try:
                snapshot = await take_snapshot(self._context.coordinator())
                why = self._unfinished(snapshot)
            except StreamHouseError as error:
                why = [f"no answer: {error.reason}: {error.message}"]
            if not why:
                return snapshot
            await asyncio.sleep(POLL_S)
        self._blame("not-settled", "; ".join(why))
        return None

    def _unfinished(self, snapshot: Snapshot) -> list[str]:
        missing = []
        for (topic, partition), part in sorted(snapshot.items()):
            for item in part.ranges:
                open_end = item.status == "open" and item is part.ranges[-1]
                if not open_end and not (item.HasField("end_offset") and item.registered_end >= item.end_offset):
                    missing.append(
                        f"{topic}/{partition} epoch {item.epoch} of {item.agent_id} is {item.status}, registered to "
                        f"{item.registered_end} of {item.end_offset if item.HasField('end_offset') else '?'}"
                    )
        for node in self._nodes:
            if isinstance(node, IngestNode):
                try:
                    unregistered = node.describe() if node.up and node.service else -1
                except StreamHouseError as error:
                    missing.append(f"{node.name}: {error.message}")
                else:
                    if unregistered:
                        missing.append(f"{node.name} holds {unregistered} bytes that are not registered")
        return missing

    async def _read_everything(self, deadline: float, snapshot: Snapshot) -> bool:
        """By every query service: as far as it said itself that there is something, and as far as we know better."""
        for (topic, partition), part in sorted(snapshot.items()):
            self._ends[topic, partition] = _end_of(part)
            for node in self._nodes:
                if isinstance(node, QueryNode) and not await self._read_back(node, topic, partition, deadline):
                    return False
        return True

    async def _read_back(self, node: Node, topic: str, partition: int, deadline: float) -> bool:
        """From where it was read to before. Blames it when that fails."""
        query, why = QueryClient(self._context.connection([node.address])), ""
        offset = self._read_to.get((node.name, topic, partition), 0)
        while self._loop.time() < deadline:
            request = query_pb2.FetchRequest(topic=topic, partition=partition, offset=offset, max_bytes=READ_BYTES)
            try:
                response = await query.fetch(request)
                why = response.waiting_reason
            except StreamHouseError as error:
                why = f"{error.reason}: {error.message}"
            if why:
                await asyncio.sleep(POLL_S)
                continue
            offsets, values = records_of(response, offset)
            self._history.write(h.ReadBack(node.name, topic, partition, h.spans_of(offsets), values))
            if response.next_offset > offset:
                offset = response.next_offset
            elif offset >= max(response.high_watermark, self._ends[topic, partition]):
                self._ends[topic, partition] = self._read_to[node.name, topic, partition] = offset
                return True
            else:
                why = f"nothing more, and no reason, below {self._ends[topic, partition]}"
                await asyncio.sleep(POLL_S)
        self._blame("unreadable", f"{topic}/{partition} at {offset} by {node.name}: {why}")
        return False

    async def _swept(self, deadline: float, snapshot: Snapshot) -> Snapshot:
        """The metadata once the sweep has left only what it refers to; if that never comes, as they are: what is left
        is the checker's to find."""
        while self._loop.time() < deadline:
            before = self._object_keys()
            try:
                snapshot = await take_snapshot(self._context.coordinator())
            except StreamHouseError:
                await asyncio.sleep(POLL_S)
                continue
            referred = {segment.object_key for part in snapshot.values() for segment in part.segments}
            at_rest = before == self._object_keys() and not self._context.store_rates.under_way
            if at_rest and before <= referred and not self._unfinished(snapshot):
                break
            await asyncio.sleep(1)
        return snapshot

    def _object_keys(self) -> set[str]:
        return {key for key in self._context.objects._objects if key.startswith(("data/", "mixed/"))}

    def _record(self, snapshot: Snapshot) -> None:
        for (topic, partition), part in sorted(snapshot.items()):
            for item in part.ranges:
                end = item.end_offset if item.HasField("end_offset") else -1
                self._history.write(
                    h.Range(
                        topic, partition, item.epoch, item.start_offset, item.limit_offset, item.registered_end, end,
                        item.status,
                    )
                )  # fmt: skip
            for ref in part.segments:
                key = "" if ref.lost_reason else ref.object_key
                self._history.write(
                    h.Segment(
                        ref.segment_id, topic, partition, ref.epoch, ref.base_offset, ref.end_offset, key,
                        ref.object_at, ref.size_bytes,
                    )
                )  # fmt: skip
        for key in sorted(self._object_keys()):
            self._history.write(h.StoredObject(key, self._context.objects._objects[key][0].size_bytes))


async def take_snapshot(coordinator: CoordinatorClient) -> Snapshot:
    """Per partition its ranges and all its segments. Raises StreamHouseError."""
    found: Snapshot = {}
    async for part in coordinator.get_snapshot(coordinator_pb2.GetSnapshotRequest()):
        for item in part.partitions:
            where = (item.topic.topic, item.partition)
            if where in found:
                found[where].segments.extend(item.segments)
            else:
                found[where] = item
    return found


def _end_of(part: Any) -> int:
    """Up to where the partition is registered."""
    return max((segment.end_offset for segment in part.segments), default=0)
