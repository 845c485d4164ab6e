"""One cluster in memory: the real coordinator over its memory store, and a memory object store. Tests add the services
that they are about, built from their real parts.

Owns: the coordinator, its tables, the objects. Does not own: the services under test.
Invariants: tables change in the coordinator's own transactions alone, but for facts that a test states (`commit`), for
what stands for time that went by (`expire_claims`) and for a database that another one takes the place of (`restore`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shformat import decode_batch, open_segment, read_block, run_plan_async
from shproto.events import Event
from shproto.v1 import coordinator_pb2 as c
from shproto.v1 import types_pb2
from shruntime.clock import SystemClock
from shstore import MemoryStore, ObjectStore
from streamhouse_coordinator import messages
from streamhouse_coordinator.adapters.memory import position_in
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.pruning import pruning
from streamhouse_coordinator.service import buffers, sessions
from streamhouse_coordinator.settings import CoordinatorSettings

from tests.platform.coordinator import Metadata, coordinator_over
from tests.platform.peer import Peer

# Leases last for minutes, whatever the machine has to do: a test ends the session or claim that it wants ended.
SETTINGS: dict[str, Any] = {"session_ttl_ms": 600_000, "group_session_timeout_ms": 600_000}

Tables = dict[str, dict[tuple[object, ...], Any]]


class Platform:
    """`coordinator`: the coordinator as its callers reach it. `clock` is PostgreSQL's; one that stands still keeps what
    failed from being claimed again. The coordinator works without `start`, but for its feed and its periodic work."""

    def __init__(self, clock: Any = None, objects: MemoryStore | None = None, **settings: Any) -> None:
        self.clock = clock or SystemClock()
        self.metadata = Metadata(self.clock)
        self.service = coordinator_over(
            self.metadata, CoordinatorSettings.load({}, **(SETTINGS | settings)), self.metadata.listen
        )
        self.coordinator: Any = Peer(self.service.api, "the coordinator")
        self.objects = objects or MemoryStore(now_ms=self.clock.wall_ms)

    async def start(self) -> None:
        await self.service.start()

    async def stop(self) -> None:
        await self.service.stop()

    async def create_topic(self, topic: str = "orders", partitions: int = 1, **settings: Any) -> bytes:
        """Returns the topic's id."""
        request = c.CreateTopicRequest(topic=topic, partitions=partitions, **settings)
        return (await self.service.api.create_topic(request)).topic_id

    async def delete_topic(self, topic: str = "orders") -> None:
        await self.service.api.delete_topic(c.DeleteTopicRequest(topic=topic))

    # ---- knobs

    async def expire_claims(self) -> None:
        """Ends all claims, and all waits of what was given back, as time does."""
        workers = {row.worker_id for row in [*self.rows(t.BUFFER_CLAIMS), *self.rows(t.COMPACTION_CLAIMS)]}
        await self.service.context.store.run(lambda tx: buffers.free_claims(tx, workers - {""}))
        claims = self.metadata.tables.get(t.BUFFER_CLAIMS.name, {})
        claims.update({key: replace(row, free_at_ms=0) for key, row in claims.items()})
        self.metadata.tables.pop(t.COMPACTION_CLAIMS.name, None)

    async def expire_session(self, session_id: str) -> None:
        await sessions.end_session(self.service.context, session_id, "expired")

    async def commit(self, *events: Event) -> None:
        """States facts that no service under test brings about, as events of one transaction."""
        await self.service.context.store.run(lambda tx: tx.append(events))

    async def prune(self, up_to: int) -> None:
        """Prunes the events up to this position, as after their retention."""
        rows = [row for row in self.rows(t.EVENTS) if row.position <= up_to]
        await self.service.context.store.run(lambda tx: tx.apply(pruning(rows)))

    def dump(self) -> Tables:
        """Returns the tables as they are now, for `restore`."""
        return {name: dict(rows) for name, rows in self.metadata.tables.items()}

    def restore(self, dump: Tables) -> None:
        """Puts an old dump in the place of the tables."""
        self.metadata.tables = {name: dict(rows) for name, rows in dump.items()}

    # ---- what is there

    def rows(self, table: t.Table[Any]) -> list[Any]:
        return list(self.metadata.tables.get(table.name, {}).values())

    @property
    def position(self) -> int:
        """The position of the last event."""
        return position_in(self.metadata.tables)

    @property
    def segments(self) -> dict[str, types_pb2.SegmentRef]:
        names = {row.topic_id: row.topic for row in self.rows(t.TOPICS)}
        rows = self.rows(t.SEGMENTS)
        return {row.segment_id: messages.segment_ref(row, names.get(row.topic_id, "")) for row in rows}

    def of_partition(self, topic_id: bytes, partition: int) -> list[types_pb2.SegmentRef]:
        found = [s for s in self.segments.values() if (s.topic_id, s.partition) == (topic_id, partition)]
        return sorted(found, key=lambda segment: segment.base_offset)

    @property
    def registrations(self) -> list[int]:
        """The results of all registrations so far."""
        return [result for answer in self.coordinator.answers["register_segments"] for result in answer.results]


async def stored_records(store: ObjectStore, segment: types_pb2.SegmentRef) -> list[tuple[int, bytes | None]]:
    """Returns (offset, value) of every record of a registered segment, read back from the store."""

    async def read(at: int, size_bytes: int) -> bytes:
        return await store.get(segment.object_key, at=segment.object_at + at, size_bytes=size_bytes)

    header, index = await run_plan_async(open_segment(segment.size_bytes), read)
    assert (header.topic_id, header.partition) == (segment.topic_id, segment.partition)
    found: list[tuple[int, bytes | None]] = []
    for entry in index:
        records = decode_batch(await run_plan_async(read_block(entry), read))
        found += zip(records.offsets.tolist(), records.values.to_list(), strict=True)
    return found
