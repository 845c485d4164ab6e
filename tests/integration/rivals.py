"""Two ingest agents that may both believe they lead a partition: a real coordinator, a segmenter and a query service in
this process, with what it takes to keep an agent from hearing that it was deposed."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from shformat import Records, decode_batch, encode_batch
from shproto.errors import DataLoss, SessionExpired, Unavailable
from shproto.events import Event, event_from_json
from shproto.v1 import coordinator_pb2, ingest_pb2, query_pb2
from shstore import MemoryStore, ObjectStore
from streamhouse_coordinator.core import tables
from streamhouse_coordinator.ports import where
from streamhouse_coordinator.service import sessions
from streamhouse_coordinator.settings import CoordinatorSettings
from streamhouse_coordinator.wiring import CoordinatorService
from streamhouse_coordinator.wiring import build as build_coordinator
from streamhouse_ingest.settings import IngestSettings
from streamhouse_ingest.wiring import IngestService
from streamhouse_ingest.wiring import build as build_ingest
from streamhouse_query.settings import QuerySettings
from streamhouse_query.wiring import build as build_query
from streamhouse_segmenter.settings import SegmenterSettings
from streamhouse_segmenter.wiring import build as build_segmenter

TOPIC = "orders"
HOUR_MS = 3_600_000
PATIENCE_S = 60
"""Of every wait; nothing here depends on how long one takes."""


class HardOfHearing:
    """The coordinator as an agent meets it whose calls get through while `deaf`, but for those that would tell it that
    it does not lead any more. `refused`: announcements that the coordinator refused."""

    def __init__(self, api: Any) -> None:
        self._api = api
        self.deaf = False
        self.refused = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._api, name)

    async def _heard(self, call: Awaitable[Any]) -> Any:
        answer = await call
        if self.deaf:
            raise Unavailable("the answer was lost on the way")
        return answer

    async def heartbeat(self, request: Any) -> Any:
        if self.deaf:
            raise Unavailable("lost on the way")
        return await self._api.heartbeat(request)

    async def get_grants(self, request: Any) -> Any:
        return await self._heard(self._api.get_grants(request))

    async def get_metadata(self, request: Any) -> Any:
        return await self._heard(self._api.get_metadata(request))

    async def follow_events(self, request: Any) -> AsyncIterator[Any]:
        if self.deaf:
            raise Unavailable("lost on the way")
        async for row in self._api.follow_events(request):
            if self.deaf:
                raise Unavailable("the stream broke")
            yield row

    async def announce_buffer(self, request: Any) -> Any:
        try:
            return await self._api.announce_buffer(request)
        except SessionExpired:
            self.refused += 1
            raise


class GatedStore(MemoryStore):
    """Uploads wait in front of the gate while it is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.gate.set()
        self.waiting = 0

    async def put(self, key: str, parts: Sequence[bytes | memoryview], *, if_absent: bool = True) -> Any:
        self.waiting += 1
        await self.gate.wait()
        self.waiting -= 1
        return await super().put(key, parts, if_absent=if_absent)


class Witness:
    """The coordinator as the segmenter meets it; remembers how its registrations were judged: (epoch, base, end)."""

    def __init__(self, api: Any) -> None:
        self._api = api
        self.judged: dict[tuple[int, int, int], set[int]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._api, name)

    async def register_segments(self, request: Any) -> Any:
        response = await self._api.register_segments(request)
        for segment, result in zip(request.segments, response.results, strict=True):
            place = (segment.epoch, segment.base_offset, segment.end_offset)
            self.judged.setdefault(place, set()).add(result)
        return response


class Rivals:
    """`old` leads first, `new` is granted the next epoch. `acknowledged`: by offset, whoever did."""

    def __init__(
        self, coordinator: CoordinatorService, store: Any, witness: Witness, query: Any, apis: dict[str, Any]
    ) -> None:
        self.coordinator = coordinator
        self.store = store
        self.witness = witness
        self.agents: dict[str, IngestService] = {}
        self.ears: dict[str, HardOfHearing] = {}
        self.acknowledged: dict[int, bytes] = {}
        self._query = query
        self._apis = apis

    # ---- agents

    async def start_agent(
        self, stack: contextlib.AsyncExitStack, name: str, directory: Path, address: str, **changed: Any
    ) -> None:
        settings = IngestSettings.load(
            {}, wal_dir=str(directory / name), agent_id=name, shutdown_timeout_ms=50, retry_max_ms=100, **changed
        )
        self.ears[name] = HardOfHearing(self.coordinator.api)
        self.agents[name] = build_ingest(settings, self.ears[name])  # type: ignore[arg-type]
        self._apis[address] = self.agents[name].api
        await self.agents[name].start(address)
        stack.push_async_callback(self.agents[name].stop)

    def is_leading(self, name: str) -> bool:
        """As the agent itself believes."""
        return self.agents[name].agent.running().logs.led(TOPIC, 0) is not None

    async def leads(self, name: str) -> None:
        await until(lambda: self.is_leading(name))

    async def depose(self, name: str) -> None:
        """The coordinator gives the agent's leases away; the agent does not hear of it."""
        self.ears[name].deaf = True
        rows = await self._select(tables.SESSIONS, agent_id=name)
        await sessions.end_session(self.coordinator.context, rows[0].session_id, "unreachable")

    async def produce(self, name: str, value: bytes, acks: int) -> int:
        """Its offset, once it is acknowledged. Fails if that was acknowledged before (G2)."""
        request = ingest_pb2.ProduceRequest(
            topic=TOPIC,
            partition=0,
            batch=encode_batch(Records.from_lists([value], timestamps_ms=1_000)),
            acks=acks,  # type: ignore[arg-type]
            timeout_ms=HOUR_MS // 6,
        )
        answer = await self.agents[name].api.produce(request)
        assert answer.base_offset not in self.acknowledged, f"offset {answer.base_offset} was acknowledged twice"
        self.acknowledged[answer.base_offset] = value
        return answer.base_offset

    async def produce_many(self, name: str, what: str, count: int, acks: int) -> list[int]:
        return [await self.produce(name, f"{name} {what} {n}".encode(), acks) for n in range(count)]

    # ---- the record

    async def _select(self, table: Any, **equals: Any) -> list[Any]:
        return await self.coordinator.context.store.run(lambda tx: tx.select(table, where(**equals)))

    async def range(self, epoch: int) -> tables.RangeRow:
        (row,) = await self._select(tables.RANGES, epoch=epoch)
        return row  # type: ignore[no-any-return]

    async def registered(self, epoch: int) -> list[tuple[int, int]]:
        """(base, end) of the epoch's segments."""
        rows = await self._select(tables.SEGMENTS, epoch=epoch)
        return sorted((row.base_offset, row.end_offset) for row in rows)

    async def object_keys(self) -> list[str]:
        """Of the objects that segments lie in."""
        return sorted({row.object_key for row in await self._select(tables.SEGMENTS)})

    async def events(self, kind: type[Event]) -> list[Event | None]:
        rows = await self._select(tables.EVENTS, type=kind.__name__)
        return [event_from_json(row.type, row.payload) for row in rows]

    async def settle_lost(self, epoch: int) -> str:
        """As `streamhouse partition settle --lost` does. The range's status afterwards."""
        request = coordinator_pb2.DeclareLostRequest(topic=TOPIC, partition=0, epochs=[epoch], reason="the disk burnt")
        return (await self.coordinator.api.declare_lost(request)).ranges[0].status

    async def check_registry(self) -> None:
        """G2, G4: no offset is in two segments, and each lies in the range of its epoch."""
        rows = sorted(await self._select(tables.SEGMENTS), key=lambda row: row.base_offset)
        end = 0
        for row in rows:
            owned = await self.range(row.epoch)
            assert row.base_offset >= end, "two segments for one offset"
            assert owned.start_offset <= row.base_offset < row.end_offset <= owned.registered_end
            end = row.end_offset

    # ---- readers

    async def fetch(self, offset: int) -> query_pb2.FetchResponse:
        request = query_pb2.FetchRequest(topic=TOPIC, partition=0, offset=offset, max_bytes=1 << 20)
        return await self._query.api.fetch(request)  # type: ignore[no-any-return]

    async def read(self) -> tuple[dict[int, bytes | None], list[tuple[int, int]]]:
        """All that a reader gets, in its order, and the spans that it was told are lost."""
        found: dict[int, bytes | None] = {}
        lost: list[tuple[int, int]] = []
        offset = 0
        while True:
            try:
                response = await self.fetch(offset)
            except DataLoss as error:
                lost.append((int(error.details["base_offset"]), int(error.details["end_offset"])))
                offset = int(error.details["next_offset"])
                continue
            assert not response.waiting_reason, response.waiting_reason
            for batch in response.batches:
                _take(found, batch, offset)
            if not response.batches and response.next_offset == offset:
                assert offset >= response.high_watermark, f"an empty success at {offset}"
                return found, lost
            offset = response.next_offset


def _take(found: dict[int, bytes | None], batch: bytes, offset: int) -> None:
    """G3: what a reader at `offset` gets is in order, nothing twice."""
    records = decode_batch(batch)
    for at, value in zip(records.offsets.tolist(), records.values.to_list(), strict=True):
        if at >= offset:
            assert at > max(found, default=-1), f"offset {at} out of order, or twice"
            found[at] = value


async def until(met: Callable[[], Any]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            answer = met()
            if await answer if asyncio.iscoroutine(answer) else answer:
                return
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def rivals(
    dsn: str, directory: Path, min_acks: int, store: ObjectStore | None = None, **of_old: Any
) -> AsyncIterator[Rivals]:
    """Everything runs over `store`, by default one with a gate; `old` leads, an agent with the settings `of_old`."""
    async with contextlib.AsyncExitStack() as stack:
        found = await _platform(stack, dsn, directory, store or GatedStore())
        # Somebody answers at the agents' addresses, so that the coordinator's probe takes nobody for dead.
        old, new = (_listening_address(stack) for _ in range(2))
        await found.start_agent(stack, "old", directory, old, **of_old)
        create = coordinator_pb2.CreateTopicRequest(topic=TOPIC, partitions=1, min_acks=min_acks)  # type: ignore[arg-type]
        await found.coordinator.api.create_topic(create)
        await found.leads("old")
        await found.start_agent(stack, "new", directory, new)
        yield found


async def _platform(stack: contextlib.AsyncExitStack, dsn: str, directory: Path, store: ObjectStore) -> Rivals:
    settings = CoordinatorSettings.load({}, pg_dsn=dsn, session_ttl_ms=HOUR_MS, heartbeat_interval_ms=200)
    coordinator = build_coordinator(settings)
    await coordinator.start()
    stack.push_async_callback(coordinator.stop)
    witness, agents = Witness(coordinator.api), dict[str, Any]()
    segmenter = build_segmenter(
        SegmenterSettings.load(
            {},
            worker_id="segmenter-1",
            scan_interval_ms=100,
            handover_retry_max_ms=200,
            handover_refused_retry_ms=200,
        ),
        witness,  # type: ignore[arg-type]
        store,
        agents.__getitem__,
    )
    await segmenter.start()
    stack.push_async_callback(segmenter.stop)
    query_settings = QuerySettings.load({}, cache_dir=directory / "cache")
    query = build_query(query_settings, coordinator.api, store, agents.__getitem__)
    await query.start("127.0.0.1:1")
    stack.push_async_callback(query.stop)
    return Rivals(coordinator, store, witness, query, agents)


def _listening_address(stack: contextlib.AsyncExitStack) -> str:
    listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    return f"127.0.0.1:{listening.getsockname()[1]}"
