"""Subscriptions: many partitions at once, one response at a time, bounded memory, errors of one partition only."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from typing import Any

import pytest
from shformat import decode_batch, read_batch_header
from shproto.errors import DataLoss, InvalidArgument, StreamHouseError
from shproto.rpc import Connection
from shproto.services import QueryClient
from shproto.v1 import ingest_pb2, query_pb2
from shread import subscribe
from shread.reads import Fetched, Want
from shread.subscribe import Source, SubscribeStream
from shruntime.byte_budget import ByteBudget
from shruntime.clock import ManualClock
from shruntime.server import RpcServer
from streamhouse_query import api
from streamhouse_query.wiring import QueryService

from services.query.tests.start_query import StartQuery
from services.query.tests.test_query_fetch import one_partition
from tests.platform.read_world import World, values_of
from tests.platform.virtual_time import virtual_time

Responses = AsyncIterator[query_pb2.FetchResponse]


class Requests:
    """What a subscriber says: one request at first, then what a test adds."""

    def __init__(self, *requests: query_pb2.SubscribeRequest) -> None:
        self._queue: asyncio.Queue[query_pb2.SubscribeRequest] = asyncio.Queue()
        for request in requests:
            self._queue.put_nowait(request)

    def __aiter__(self) -> "Requests":
        return self

    async def __anext__(self) -> query_pb2.SubscribeRequest:
        return await self._queue.get()

    def consumed(self, position: int, size_bytes: int) -> None:
        update = query_pb2.WindowUpdate(position=position, size_bytes=size_bytes)
        self._queue.put_nowait(query_pb2.SubscribeRequest(window_updates=[update]))


@contextlib.asynccontextmanager
async def subscribed(
    service: QueryService, *positions: tuple[str, int, int], **fields: object
) -> AsyncIterator[Responses]:
    request = query_pb2.SubscribeRequest(
        positions=[query_pb2.FetchPosition(topic=t, partition=p, offset=o) for t, p, o in positions], **fields
    )
    async with contextlib.aclosing(service.api.subscribe(Requests(request))) as responses:
        yield responses


async def until(
    responses: Responses, enough: Callable[[query_pb2.FetchResponse], bool]
) -> list[query_pb2.FetchResponse]:
    got = []
    async with asyncio.timeout(60):
        async for response in responses:
            got.append(response)
            if enough(response):
                return got
    raise AssertionError("the stream ended")


def values_in(responses: list[query_pb2.FetchResponse], partition: int = 0) -> list[bytes | None]:
    return [
        value
        for response in responses
        if response.partition == partition
        for batch in response.batches
        for value in decode_batch(batch).values.to_list()
    ]


async def partitions(platform: World, count: int) -> None:
    await platform.create_topic("orders", count)
    await platform.start_agent("a")
    for number in range(count):
        await platform.grant("a", number=number)


async def test_history_then_what_comes(platform: World, start_query: StartQuery) -> None:
    await one_partition(platform)
    await platform.produce(values_of(500))
    await platform.register()
    await platform.produce(values_of(10, 500))
    service = await start_query()
    async with subscribed(service, ("orders", 0, 0)) as responses:
        got = await until(responses, lambda response: response.next_offset == 510)
        assert values_in(got) == values_of(510)
        for turn in range(3):
            await platform.produce(values_of(10, 510 + turn * 10))
            got = await until(responses, lambda response, end=520 + turn * 10: response.next_offset == end)
            assert values_in(got) == values_of(10, 510 + turn * 10)
            await platform.register()


async def test_every_partition_has_its_turn_and_no_offset_comes_twice(platform: World, start_query: StartQuery) -> None:
    await partitions(platform, 20)
    for number in range(20):
        for turn in range(5):
            await platform.produce(values_of(100, turn * 100), number=number)
            await platform.register(number=number)
    service = await start_query(subscribe_buffer_bytes=1 << 20)
    async with subscribed(service, *[("orders", n, 0) for n in range(20)], max_bytes=2_000) as responses:
        left = set(range(20))

        def done(response: query_pb2.FetchResponse) -> bool:
            if response.next_offset == 500:
                left.discard(response.partition)
            return not left

        got = await until(responses, done)
    for number in range(20):
        assert values_in(got, number) == values_of(500)
    first_turns = [response.partition for response in got if response.batches][:20]
    assert len(set(first_turns)) > 10, "by turns, not one partition after the other"


def decoded_bytes_of(response: query_pb2.FetchResponse) -> int:
    return sum(read_batch_header(batch).decoded_bytes for batch in response.batches)


@pytest.mark.parametrize("registered", [True, False])
async def test_a_response_is_bounded_by_what_it_takes_decoded(
    platform: World, start_query: StartQuery, registered: bool
) -> None:
    """4 MiB of values that are all the same are hundreds once they are decoded."""
    await one_partition(platform)
    for _ in range(20):
        await platform.produce([bytes(10_000)] * 20)
    if registered:
        await platform.register(block_bytes_target=200_000)
    service = await start_query()
    async with subscribed(service, ("orders", 0, 0), max_bytes=1 << 20) as responses:
        got = await until(responses, lambda response: response.next_offset == 400)
    assert values_in(got) == [bytes(10_000)] * 400
    assert max(decoded_bytes_of(response) for response in got) <= 1 << 20
    assert len([response for response in got if response.batches]) < 10, "as much as it may be"


async def test_a_ratio_that_is_known_keeps_agents_from_sending_what_is_not_sent_on(
    platform: World, start_query: StartQuery
) -> None:
    await one_partition(platform)
    for _ in range(200):
        await platform.produce([bytes(10_000)] * 20)
    service = await start_query()
    asked = []
    read_tail = platform.agents["a"].read_tail

    async def count(request: ingest_pb2.ReadTailRequest) -> ingest_pb2.ReadTailResponse:
        response = await read_tail(request)
        asked.append(sum(map(len, response.batches)))
        return response

    platform.agents["a"].read_tail = count  # type: ignore[method-assign]
    async with subscribed(service, ("orders", 0, 0), max_bytes=1 << 20) as responses:
        got = await until(responses, lambda response: response.next_offset == 4_000)
    sent = sum(len(batch) for response in got for batch in response.batches)
    assert sum(asked) < 4 * sent, "but for the first time, before the ratio is known"


async def test_a_window_that_is_used_up_holds_up_no_other_partition(platform: World, start_query: StartQuery) -> None:
    """One budget of 1 MiB for all: the partition that nobody takes records of must hold none of it."""
    await partitions(platform, 3)
    for number in (0, 1):
        for turn in range(20):
            await platform.produce(values_of(2_000, turn * 2_000, 32), number=number)
        await platform.register(number=number, block_bytes_target=64 * 1024)
    service = await start_query(subscribe_buffer_bytes=1 << 20)
    windows = (300_000, 1 << 30, 300_000)
    positions = [
        query_pb2.FetchPosition(topic="orders", partition=number, offset=0, window_bytes=window)
        for number, window in enumerate(windows)
    ]
    requests = Requests(query_pb2.SubscribeRequest(positions=positions, max_bytes=1 << 20))
    async with contextlib.aclosing(service.api.subscribe(requests)) as responses:
        got = await until(responses, lambda response: response.partition == 1 and response.next_offset == 40_000)
        await platform.produce([b"quiet"], number=2)
        got += await until(responses, lambda response: response.partition == 2 and bool(response.batches))
        first = sum(decoded_bytes_of(response) for response in got if response.partition == 0)
        a_block = 200_000  # its records of 32 bytes count as many for what they take beside
        assert 300_000 <= first < 300_000 + a_block
        read = max(response.next_offset for response in got if response.partition == 0)
        assert read < 40_000

        requests.consumed(0, 300_000)
        got = await until(responses, lambda response: response.partition == 0 and bool(response.batches))
        assert values_in(got) == values_of(got[-1].next_offset - read, read, 32)
        requests.consumed(0, 1 << 30)
        got += await until(responses, lambda response: response.next_offset == 40_000)
        assert values_in(got) == values_of(40_000 - read, read, 32)


async def test_a_subscriber_without_windows_gets_partitions_by_turns_from_what_is_read_ahead(
    platform: World, start_query: StartQuery, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_ahead: list[tuple[int, int, bool]] = []  # partition, next offset, has records
    deliver = SubscribeStream._deliver

    def noted(self: SubscribeStream, number: int, delivery: Any) -> None:
        response = delivery.response
        read_ahead.append((response.partition, response.next_offset, bool(response.batches)))
        deliver(self, number, delivery)

    monkeypatch.setattr(SubscribeStream, "_deliver", noted)
    await partitions(platform, 2)
    for turn in range(20):
        await platform.produce(values_of(2_000, turn * 2_000, 32))
    await platform.register(block_bytes_target=64 * 1024)
    service = await start_query()
    async with subscribed(service, ("orders", 0, 0), ("orders", 1, 0), max_bytes=128 * 1024) as responses:
        await until(responses, lambda response: response.partition == 1)
        await anext(responses)  # now it has taken that, too
        async with asyncio.timeout(60):
            while not any(partition == 0 and next_offset == 40_000 for partition, next_offset, _ in read_ahead):
                await asyncio.sleep(0.01)
            await platform.produce([b"quiet"], number=1)
            while (1, 1, True) not in read_ahead:
                await asyncio.sleep(0.01)
        assert sum(partition == 0 for partition, *_ in read_ahead) > 5, "it is in line behind them"
        behind = await until(responses, lambda response: response.partition == 1)
    assert len(behind) <= 2 and values_in(behind, 1) == [b"quiet"]


@pytest.mark.parametrize(
    ("position", "later", "named"),
    [
        ({"window_bytes": 1}, {"window_updates": [{"position": 1, "size_bytes": 1}]}, "must be 0 to 0"),
        ({}, {"window_updates": [{"position": 0, "size_bytes": 1}]}, "was given none"),
        ({"window_bytes": 1}, {"positions": [{"topic": "orders"}]}, "first message only"),
    ],
)
async def test_bad_later_requests_end_a_subscription(
    platform: World, start_query: StartQuery, position: dict, later: dict, named: str
) -> None:
    await one_partition(platform)
    service = await start_query()
    first = query_pb2.SubscribeRequest(positions=[query_pb2.FetchPosition(topic="orders", **position)])
    requests = Requests(first, query_pb2.SubscribeRequest(**later))
    with pytest.raises(InvalidArgument, match=named):
        async with contextlib.aclosing(service.api.subscribe(requests)) as responses:
            await until(responses, lambda response: False)


@pytest.mark.long
async def test_a_slow_subscriber_does_not_make_the_service_read_on(platform: World, start_query: StartQuery) -> None:
    await partitions(platform, 4)
    for number in range(4):
        for turn in range(40):
            await platform.produce(values_of(2_000, turn * 2_000, 32), number=number)
        await platform.register(number=number, block_bytes_target=64 * 1024)
    service = await start_query(subscribe_buffer_bytes=1 << 20)
    async with subscribed(service, *[("orders", n, 0) for n in range(4)], max_bytes=256 * 1024) as responses:
        await anext(responses)
        await asyncio.sleep(0.3)
        total = sum(segment.size_bytes for n in range(4) for segment in platform.of_partition(platform.topic_id(), n))
        assert total > 4 << 20
        assert service.api._counters.fetched_bytes <= (1 << 20) + 256 * 1024
        got = await until(responses, lambda response: response.next_offset == 80_000)
        assert got


async def test_a_subscriber_at_the_end_that_takes_nothing_holds_one_response(
    platform: World, start_query: StartQuery
) -> None:
    await one_partition(platform)
    service = await start_query(subscribe_heartbeat_ms=10)
    async with subscribed(service, ("orders", 0, 0)) as responses:
        await anext(responses)
        before = service.api._counters.fetches
        for _ in range(20):
            await platform.produce([b"x"])
            await asyncio.sleep(0.005)
        assert service.api._counters.fetches <= before + 1


async def test_the_end_is_told_at_once_and_then_by_heartbeats(platform: World, start_query: StartQuery) -> None:
    await one_partition(platform)
    await platform.produce([b"x"])
    service = await start_query(subscribe_heartbeat_ms=100)
    loop = asyncio.get_running_loop()
    with virtual_time():
        async with subscribed(service, ("orders", 0, 1)) as responses:
            times = []
            for _ in range(4):
                response = await anext(responses)
                assert (response.next_offset, response.high_watermark) == (1, 1)
                assert not response.waiting_reason and not response.batches
                times.append(loop.time())
    gaps = [after - before for before, after in pairwise(times)]
    assert all(0.08 < gap < 0.5 for gap in gaps)


async def test_a_waiting_reason_is_told_when_it_begins_changes_and_ends(
    platform: World, start_query: StartQuery
) -> None:
    await one_partition(platform)
    await platform.produce([b"x"])
    service = await start_query()
    async with subscribed(service, ("orders", 0, 0)) as responses:
        await until(responses, lambda response: response.next_offset == 1)
        await platform.produce([b"y"])
        await until(responses, lambda response: response.next_offset == 2)
        await platform.stop_agent("a")
        no_session = (await until(responses, lambda response: bool(response.waiting_reason)))[-1]
        assert "no session" in no_session.waiting_reason
        await platform.orphan()
        unsettled = (await until(responses, lambda r: r.waiting_reason != no_session.waiting_reason))[-1]
        assert "no session" in unsettled.waiting_reason or "unsettled" in unsettled.waiting_reason
        told = await anext(responses) if "unsettled" not in unsettled.waiting_reason else unsettled
        assert "unsettled" in told.waiting_reason
        await platform.settle()
        await platform.start_agent("a")
        await platform.grant("a")
        ended = await until(responses, lambda response: not response.waiting_reason)
        assert ended[-1].next_offset == 2
        await platform.produce([b"z"])
        assert values_in(await until(responses, lambda response: bool(response.batches))) == [b"z"]


async def test_one_partition_fails_and_the_others_go_on(platform: World, start_query: StartQuery) -> None:
    await partitions(platform, 2)
    await platform.produce(values_of(5))
    await platform.register()
    await platform.produce(values_of(5, 5))
    await platform.lose_span(10, "gone")
    service = await start_query()
    wanted = [("orders", 0, 0), ("orders", 1, 0), ("nowhere", 0, 0), ("orders", 7, 0), ("orders", 2, -1)]
    async with subscribed(service, *wanted) as responses:
        errors: dict[tuple[str, int], str] = {}
        got = []
        while len(errors) < 4:
            response = await anext(responses)
            got.append(response)
            if response.HasField("error"):
                errors[response.topic, response.partition] = response.error.reason
        assert errors == {
            ("orders", 0): "DATA_LOSS",
            ("nowhere", 0): "UNKNOWN_TOPIC",
            ("orders", 7): "UNKNOWN_PARTITION",
            ("orders", 2): "INVALID_ARGUMENT",
        }
        assert values_in(got, 0) == values_of(5)
        await platform.produce([b"still there"], number=1)
        got = await until(responses, lambda response: bool(response.batches))
        assert values_in(got, 1) == [b"still there"]


async def test_a_subscription_ends_when_all_its_partitions_have_failed(
    platform: World, start_query: StartQuery
) -> None:
    service = await start_query()
    async with subscribed(service, ("nowhere", 0, 0), ("nowhere", 1, 0)) as responses:
        got = [response async for response in responses]
    assert [response.error.reason for response in got] == ["UNKNOWN_TOPIC"] * 2


async def test_bad_subscriptions_are_refused(platform: World, start_query: StartQuery) -> None:
    await one_partition(platform)
    service = await start_query(subscribe_positions_max=2)
    for positions, fields in (
        ([], {}),
        ([("orders", 0, 0)] * 2, {}),
        ([("orders", n, 0) for n in range(3)], {}),
        ([("orders", 0, 0)], {"format": 9}),
        ([("orders", 0, 0)], {"max_bytes": 1 << 30}),
        ([("orders", 0, 0)], {"window_updates": [query_pb2.WindowUpdate()]}),
    ):
        with pytest.raises(InvalidArgument):
            async with subscribed(service, *positions, **fields) as responses:
                await anext(responses)
    windowed = query_pb2.FetchPosition(topic="orders", window_bytes=1)
    plain = query_pb2.SubscribeRequest(positions=[windowed], format=query_pb2.FETCH_FORMAT_RECORDS)
    for request in (query_pb2.SubscribeRequest(), plain):
        with pytest.raises(InvalidArgument):
            await anext(service.api.subscribe(Requests(request)))


async def test_stopping_ends_subscriptions(platform: World, start_query: StartQuery) -> None:
    await one_partition(platform)
    service = await start_query()
    async with subscribed(service, ("orders", 0, 0)) as responses:
        await anext(responses)
        reading = asyncio.create_task(until(responses, lambda response: response.HasField("error")))
        await asyncio.sleep(0.05)
        await service.stop()
        assert (await reading)[-1].error.reason == "SHUTTING_DOWN"


async def test_over_grpc_a_subscriber_that_goes_away_leaves_nothing_running(
    platform: World, start_query: StartQuery
) -> None:
    await one_partition(platform)
    await platform.produce(values_of(10))
    service = await start_query()
    server = RpcServer("127.0.0.1:0", [(query_pb2.DESCRIPTOR.services_by_name["Query"], service.api)])
    await server.start()
    client = QueryClient(Connection([server.address]))
    position = query_pb2.FetchPosition(topic="orders", partition=0, offset=0)
    requests = Requests(query_pb2.SubscribeRequest(positions=[position]))
    async with contextlib.aclosing(client.subscribe(requests)) as responses:
        got = await until(responses, lambda response: response.next_offset == 10)
        assert values_in(got) == values_of(10)
        assert len(pumps()) == 2  # one for the partition, one for what the subscriber says
    while pumps() or service.engine.reads.index._watches:
        await asyncio.sleep(0.01)
    with pytest.raises(StreamHouseError) as error:
        await client.fetch(query_pb2.FetchRequest(topic="orders", offset=99))
    assert (error.value.reason, error.value.details["high_watermark"]) == ("OFFSET_BEYOND_END", "10")
    await client.close()
    await server.stop(0)


def pumps() -> list["asyncio.Task[object]"]:
    return [task for task in asyncio.all_tasks() if task.get_name().startswith("subscription ")]


async def test_a_partition_that_fails_with_its_records_gives_its_bytes_back(
    platform: World, start_query: StartQuery
) -> None:
    await partitions(platform, 2)
    for number in range(2):
        await platform.produce(values_of(1_000, 0, 100), number=number)
        await platform.register(number=number)
    service = await start_query()

    def source(number: int) -> Source:
        async def resolve() -> Want:
            return Want(
                partition=service.engine.reads.index.find("orders", number).key,
                topic="orders",
                offset=0,
                bytes_max=1 << 20,
            )

        async def respond(want: Want, fetched: Fetched) -> query_pb2.FetchResponse:
            if not number:
                raise DataLoss("cannot be decoded")
            return query_pb2.FetchResponse(partition=number, batches=fetched.batches, next_offset=fetched.next_offset)

        return Source(
            resolve=resolve, respond=respond, refuse=lambda error: query_pb2.FetchResponse(error=error.to_detail())
        )

    subscription = SubscribeStream(
        service.api._reads, [source(0), source(1)], budgets=[ByteBudget(1 << 20)], heartbeat_ms=1_000
    )
    async with contextlib.aclosing(subscription.responses(Requests())) as responses:
        got = await until(responses, lambda response: bool(response.batches))
    assert got[0].HasField("error") and got[-1].next_offset == 1_000


async def test_g7_idle_subscribers_cost_by_change_and_not_by_subscriber(
    platform: World, start_query: StartQuery
) -> None:
    """A hundred of them wait at the end: the agent is asked once for all, and once more for each change."""
    await one_partition(platform)
    await platform.produce(values_of(10))
    service = await start_query(subscribe_heartbeat_ms=60_000)
    agent = platform.agents["a"]
    async with contextlib.AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(subscribed(service, ("orders", 0, 10))) for _ in range(100)]
        for stream in streams:
            assert (await anext(stream)).next_offset == 10  # there is nothing, which is told at once
        waiting = [asyncio.create_task(anext(stream)) for stream in streams]
        async with asyncio.timeout(60):
            while len(service.api._reads.polls._polls) != 1 or agent.calls_waiting != 1:
                await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        before = agent.calls
        await platform.produce(values_of(1, 10))
        responses = await asyncio.gather(*waiting)
        assert [values_in([response]) for response in responses] == [values_of(1, 10)] * 100
        assert agent.calls - before <= 3
    assert not service.api._reads.polls._polls


async def test_g7_a_subscriber_that_takes_nothing_holds_no_more_than_its_own_budget_of_its_connection(
    platform: World, start_query: StartQuery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its partitions held bytes of the connection while they waited for the subscription's, until none were left."""
    own: list[ByteBudget] = []

    def make_budget(bytes_max: int) -> ByteBudget:
        own.append(ByteBudget(bytes_max))
        return own[-1]

    monkeypatch.setattr(api, "ByteBudget", make_budget)
    monkeypatch.setattr(api, "caller_connection", lambda: "one connection")
    await partitions(platform, 11)
    for number in range(11):
        for _ in range(4):
            await platform.produce([random.randbytes(100_000)], number=number)
        await platform.register(number=number, block_bytes_target=64 * 1024)
    service = await start_query(subscribe_buffer_bytes=1 << 20, subscribe_connection_bytes=2 << 20)
    many = [("orders", number, 0) for number in range(10)]
    async with subscribed(service, *many, max_bytes=1 << 18) as silent:
        await anext(silent)
        shared, _ = service.api._connections._budgets["one connection"]
        async with asyncio.timeout(60):
            while len(own[0]._waiting) + len(shared._waiting) < 7:  # nearly all of its partitions
                await asyncio.sleep(0.01)
        async with subscribed(service, ("orders", 10, 0), max_bytes=1 << 18) as responses:
            got = await until(responses, lambda response: response.next_offset == 4)
    assert sum(len(response.batches) for response in got) == 4


class _Recorded:
    """Stands where the histogram is, which shows nothing without the SDK."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def record(self, value: float) -> None:
        self.values.append(value)


async def test_deliveries_are_timed_from_the_records_being_there_to_their_stream(
    platform: World, start_query: StartQuery, monkeypatch: pytest.MonkeyPatch
) -> None:
    await one_partition(platform)
    await platform.produce(values_of(500))
    await platform.register()
    recorded, clock = _Recorded(), ManualClock(1_000)
    monkeypatch.setattr(subscribe, "delivery_duration_ms", recorded)
    service = await start_query()
    service.api._reads.clock = clock

    async def resolve() -> Want:
        return Want(
            partition=service.engine.reads.index.find("orders", 0).key, topic="orders", offset=0, bytes_max=1 << 20
        )

    async def respond(want: Want, fetched: Fetched) -> query_pb2.FetchResponse:
        clock.advance(7)
        return query_pb2.FetchResponse(
            batches=fetched.batches, next_offset=fetched.next_offset, high_watermark=fetched.high_watermark
        )

    source = Source(
        resolve=resolve, respond=respond, refuse=lambda error: query_pb2.FetchResponse(error=error.to_detail())
    )
    subscription = SubscribeStream(service.api._reads, [source], budgets=[ByteBudget(1 << 20)], heartbeat_ms=10_000)
    async with contextlib.aclosing(subscription.responses(Requests())) as responses:
        got = await until(responses, lambda response: not response.batches)  # the word that there is no more
        assert (values_in(got), recorded.values) == (values_of(500), [7])
        waiting = asyncio.create_task(until(responses, lambda response: response.next_offset == 510))
        while not service.api._reads.polls._polls:
            await asyncio.sleep(0)
        clock.advance(5_000)  # a quiet time, which no delivery had to wait for
        await platform.produce(values_of(10, 500))
        await waiting
    assert recorded.values == [7, 7]
