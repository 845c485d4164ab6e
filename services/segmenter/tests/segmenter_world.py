"""A platform with an agent whose buffers a test cuts, and what a segmenter is to make of them."""

from collections import Counter
from dataclasses import replace
from typing import Any

from shformat import decode_batch
from shproto.v1 import coordinator_pb2 as c
from shruntime.clock import ManualClock
from streamhouse_coordinator.core import tables as t

from tests.platform.log_agent import LogAgent
from tests.platform.peer import Peer
from tests.platform.platform import Platform, stored_records

LONG_MS = 3_600_000


class World(Platform):
    """`held`: the agent; `agent`: the agent as its callers reach it. `store`: the store that segmenters get. The
    database's time stands still, unless a test moves it: what failed is claimed again after `expire_claims`."""

    topic_id: bytes

    def __init__(self, clock: Any = None, store: Any = None) -> None:
        super().__init__(clock or ManualClock(100 * LONG_MS), objects=store)
        self.store: Any = self.objects
        self.held = LogAgent(self.service.api)
        self.agent: Any = Peer(self.held, "the agent")

    async def open(self, partitions: int = 6) -> None:
        """Makes the topic, and has the agent lead it."""
        self.topic_id = await self.create_topic(partitions=partitions)
        await self.held.open()

    async def seal(self, name: str, *slices: c.BufferSlice) -> None:
        await self.held.seal(name, *slices)

    def append(self, partition: int, counts: list[int]) -> c.BufferSlice:
        return self.held.append(partition, counts)

    def hold_back(self, name: str) -> None:
        """Keeps a buffer from being claimed until `expire_claims`."""
        claims = self.metadata.tables[t.BUFFER_CLAIMS.name]
        key = (self.held.id_of(name),)
        claims[key] = replace(claims[key], free_at_ms=self.clock.wall_ms() + LONG_MS)

    @property
    def waiting(self) -> list[str]:
        """Names of the buffers that are not registered in full."""
        return [self.held.name_of(row.buffer_id) for row in self.rows(t.BUFFER_CLAIMS)]

    @property
    def attempts(self) -> dict[str, int]:
        """How often each buffer was claimed, by name."""
        claimed = [answer.buffer_id for answer in self.coordinator.answers["claim_buffer"] if answer.found]
        return Counter(map(self.held.name_of, claimed))

    @property
    def released(self) -> list[c.ReleaseClaimRequest]:
        return self.coordinator.requests["release_claim"]  # type: ignore[no-any-return]

    async def check(self) -> None:
        """Every acknowledged record is in exactly one registered segment, at its offset, byte for byte."""
        assert self.waiting == []
        await assert_all_stored(self, self.store, self.held)

    async def keys(self) -> list[str]:
        return [info.key async for info in self.store.list("")]


async def new_world(partitions: int = 6, **options: Any) -> World:
    world = World(**options)
    await world.open(partitions)
    return world


async def assert_all_stored(world: Platform, store: Any, agent: LogAgent) -> None:
    """Every acknowledged record is in exactly one registered segment of its partition, at its offset, byte for byte."""
    sent: dict[tuple[bytes, int], list[tuple[int, bytes | None]]] = {}
    for (topic_id, partition, _), batches in sorted(agent.batches.items()):
        rows = [decode_batch(batch) for batch in batches]
        pairs = [pair for r in rows for pair in zip(r.offsets.tolist(), r.values.to_list(), strict=True)]
        sent.setdefault((topic_id, partition), []).extend(pairs)
    for (topic_id, partition), expected in sent.items():
        segments = world.of_partition(topic_id, partition)
        found = [pair for segment in segments for pair in await stored_records(store, segment)]
        assert found == expected, f"partition {partition}"
