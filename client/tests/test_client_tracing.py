"""Spans of producers and consumers, and the trace context in records, against a platform in memory."""

import asyncio
import sys
import threading

import pyarrow as pa
import pytest
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from shformat import HeadersColumn, decode_batch
from shproto.errors import InvalidBatch, Overloaded
from streamhouse import Consumer, Producer, sync, tracing
from streamhouse.core.producer_batch import RECORD_BYTES_MAX

OTHER = "00-" + "1" * 32 + "-" + "2" * 16 + "-01"


class Traced:
    """An SDK that keeps what ends; `sampler` decides for spans without a parent."""

    def __init__(self, monkeypatch, **options):
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False, **options)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("application")
        monkeypatch.setattr("opentelemetry.trace.get_tracer_provider", lambda: self.provider)

    def spans(self, name):
        return [span for span in self.exporter.get_finished_spans() if span.name == name]

    def span(self, name):
        (found,) = self.spans(name)
        return found


@pytest.fixture
def traced(monkeypatch):
    return Traced(monkeypatch)


@pytest.fixture
def unsampled(monkeypatch):
    return Traced(monkeypatch, sampler=ParentBased(ALWAYS_OFF))


async def headers_in(platform):
    """The headers of all records of the topic, partition by partition."""
    found = []
    batches = [batch for number in range(platform.partitions("t")) for batch in await platform.batches("t", number)]
    for batch in batches:
        columns = decode_batch(batch)
        found += [[]] * len(columns) if columns.headers is None else columns.headers.to_list()
    return found


def contexts_in(platform):
    """The trace contexts of the produce requests that came."""
    return [request.trace_context for request in platform.faults.requests["produce"]]


async def pairs_in(platform):
    """(offset, value) and headers of all records of the one partition there is."""
    return zip(await platform.records("t", 0), await headers_in(platform), strict=True)


def traceparent(span):
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def header_of(span):
    return [("traceparent", traceparent(span).encode())]


def ids(links):
    return [(link.context.trace_id, link.context.span_id) for link in links]


def id_of(span):
    return span.get_span_context().trace_id, span.get_span_context().span_id


# ---- sending


async def test_records_carry_the_context_of_their_send_span(platform, address, traced):
    await platform.create_topic("t", 1)
    platform.faults.fail("produce", Overloaded("full", retry_after_ms=20), 1)
    async with Producer(address, client_id="me") as producer:
        await (await producer.send_many("t", [b"a", b"b"]))
    span = traced.span("send t")
    assert (span.kind, span.parent) == (trace.SpanKind.PRODUCER, None)
    assert dict(span.attributes) == {
        "messaging.system": "streamhouse",
        "messaging.destination.name": "t",
        "messaging.destination.partition.id": "0",
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.client.id": "me",
        "messaging.batch.message_count": 2,
        "messaging.streamhouse.acks": "wal",
        "messaging.streamhouse.offset": 0,
    }
    assert await headers_in(platform) == [header_of(span)] * 2
    assert contexts_in(platform) == [traceparent(span)] * 2, "the retry, too"


async def test_a_record_belongs_to_the_trace_that_it_was_sent_in(platform, address, traced):
    await platform.create_topic("t", 1)
    async with Producer(address, linger_ms=60_000) as producer:

        async def request(number):
            with traced.tracer.start_as_current_span(f"request {number}") as span:
                for _ in range(number):
                    await producer.send("t", b"%d" % number)
                await asyncio.sleep(0)
                await producer.send("t", b"%d" % number)
                return span

        await producer.send("t", b"outside")
        first, second = await asyncio.gather(request(1), request(2))
        await producer.flush()
    outside, one, two = traced.spans("send t")
    assert [span.parent and span.parent.span_id for span in (outside, one, two)] == [
        None,
        first.get_span_context().span_id,
        second.get_span_context().span_id,
    ]
    assert [span.attributes["messaging.batch.message_count"] for span in (outside, one, two)] == [1, 2, 3]
    assert ids(one.links) == ids(two.links) == [id_of(outside)], "all are in the batch of the first"
    sent = [(value, *headers) for (_, value), headers in await pairs_in(platform)]
    wanted = {b"outside": outside, b"1": one, b"2": two}
    assert sent == [(value, *header_of(wanted[value])) for value, _ in sent]
    assert sorted(value for value, _ in sent) == [b"1"] * 2 + [b"2"] * 3 + [b"outside"]


async def test_many_records_are_in_the_trace_of_their_call_through_all_batches(platform, address, traced):
    await platform.create_topic("t", 3)
    async with Producer(address, batch_bytes=10_000) as producer:
        with traced.tracer.start_as_current_span("job") as job:
            result = await producer.send_many(
                "t", [b"%d" % n for n in range(3_000)], keys=[b"%d" % n for n in range(3_000)]
            )
        await result
    spans = traced.spans("send t")
    assert len(spans) > 9 and {span.parent.span_id for span in spans} == {job.get_span_context().span_id}
    assert sum(span.attributes["messaging.batch.message_count"] for span in spans) == 3_000
    sent = await headers_in(platform)
    assert len(sent) == 3_000 and {value for ((_, value),) in sent} == {traceparent(span).encode() for span in spans}


async def test_what_the_application_sets_stays(platform, address, traced):
    await platform.create_topic("t", 1)
    own = [("traceparent", OTHER.encode())]
    async with Producer(address) as producer:
        await (await producer.send_many("t", [b"a", b"b", b"c"], headers=[own, {"x": b"1"}, {}]))
    sent = header_of(traced.span("send t"))
    assert await headers_in(platform) == [own, [("x", b"1"), *sent], sent]


async def test_headers_can_be_switched_off(platform, address, traced):
    await platform.create_topic("t", 1)
    async with Producer(address, trace_headers=False) as producer:
        await producer.send_and_wait("t", b"a")
    assert await headers_in(platform) == [[]]
    assert contexts_in(platform) == [traceparent(traced.span("send t"))]


async def test_columns_carry_the_contexts_too(platform, address, traced):
    await platform.create_topic("t", 1)
    async with Producer(address) as producer:
        await producer.send_columns("t", pa.array([b"a", b"b"]), headers={"h": pa.array([b"1", None])})
    context = ("traceparent", traceparent(traced.span("send t")).encode())
    assert await headers_in(platform) == [[("h", b"1"), context], [("h", None), context]]


async def test_what_is_not_sampled_leaves_no_trace(platform, address, unsampled):
    await platform.create_topic("t", 1)
    async with Producer(address) as producer:
        with unsampled.tracer.start_as_current_span("request"):
            await producer.send_and_wait("t", b"a")
        await producer.send_and_wait("t", b"b")
    assert await headers_in(platform) == [[], []]
    assert contexts_in(platform) == ["", ""]
    async with Consumer(address, ["t"], stop_at_end=True) as consumer:
        async for record in consumer:
            with consumer.processing(record) as span:
                assert not span.is_recording()
    assert unsampled.exporter.get_finished_spans() == ()


async def test_without_an_sdk_there_is_nothing(platform, address):
    await platform.create_topic("t", 1)
    async with Producer(address) as producer:
        await producer.send_and_wait("t", b"a")
    assert await headers_in(platform) == [[]] and contexts_in(platform) == [""]
    async with Consumer(address, ["t"], stop_at_end=True) as consumer:
        async for record in consumer:
            with consumer.processing(record) as span:
                assert span is trace.INVALID_SPAN
            assert record.trace_context == Context()


async def test_without_an_sdk_nothing_is_asked_for_single_records(platform, server, address, monkeypatch):
    """The cost is counted in calls, not in time."""
    await platform.create_topic("t", 1)
    server.create_topic("t", 1)
    asked = []

    def current_span():
        if sys._getframe(1).f_globals["__name__"].startswith("streamhouse."):  # the services ask, too
            asked.append("span")
        return trace.INVALID_SPAN

    monkeypatch.setattr("opentelemetry.trace.get_current_span", current_span)
    monkeypatch.setattr("streamhouse.accumulator.tracer", lambda: asked.append("batch"))
    async with Producer(address, linger_ms=60_000) as producer:
        for _ in range(1_000):
            await producer.send("t", b"a")
        await producer.flush()
        assert asked == ["batch"]
        await producer.send_many("t", [b"a"] * 1_000)
        await producer.flush()
        assert asked == ["batch", "span", "batch"]
    asked.clear()
    with sync.Producer(server.address, linger_ms=60_000) as producer:
        for _ in range(1_000):
            producer.send("t", b"a")
        producer.flush()
    assert asked == ["batch"]


async def test_a_batch_without_room_for_headers_goes_without(platform, address, traced):
    await platform.create_topic("t", 1)
    async with Producer(address) as producer:
        await producer.send_and_wait("t", b"x" * (RECORD_BYTES_MAX - 40))
        full = [(f"h{n}", b"") for n in range(256)]
        await producer.send_and_wait("t", b"full", headers=full)
    assert await headers_in(platform) == [[], full] and len(traced.spans("send t")) == 2


async def test_a_send_that_fails_says_why(platform, address, traced):
    await platform.create_topic("t", 1)
    platform.faults.fail("produce", InvalidBatch("no"))
    async with Producer(address) as producer:
        with pytest.raises(InvalidBatch):
            await producer.send_and_wait("t", b"a")
    span = traced.span("send t")
    assert span.status.status_code is trace.StatusCode.ERROR and span.attributes["error.type"] == "INVALID_BATCH"
    assert [event.name for event in span.events] == ["exception"]


def test_the_span_of_the_thread_that_sends_counts(server, traced):
    server.create_topic("t", 1)
    wanted = {}
    with sync.Producer(server.address) as producer:

        def work(number):
            with traced.tracer.start_as_current_span("thread") as span:
                wanted[b"%d" % number] = span
                producer.send("t", b"%d" % number).result(30)
                producer.send_many("t", [b"%d" % number]).result(30)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    sent = [(value, headers) for (_, value), headers in asyncio.run(pairs_in(server.awaited))]
    assert len(sent) == 6
    parents = {span.get_span_context().span_id: span.parent.span_id for span in traced.spans("send t")}
    for value, ((_, header),) in sent:
        assert parents[int(header.split(b"-")[2], 16)] == wanted[value].get_span_context().span_id


# ---- receiving


async def test_processing_continues_the_trace_of_the_record(platform, address, traced):
    await platform.create_topic("t", 1)
    async with Producer(address) as producer:
        await producer.send_and_wait("t", b"a")
    sent = traced.span("send t")
    async with Consumer(address, ["t"], group="g", client_id="me", stop_at_end=True) as consumer:
        async for record in consumer:
            assert trace.get_current_span(record.trace_context).get_span_context().span_id == id_of(sent)[1]
            with consumer.processing(record), traced.tracer.start_as_current_span("work"):
                pass
    process, work = traced.span("process t"), traced.span("work")
    assert process.kind is trace.SpanKind.CONSUMER
    assert (process.parent.trace_id, process.parent.span_id) == id_of(sent) and ids(process.links) == [id_of(sent)]
    assert work.parent.span_id == process.get_span_context().span_id
    assert dict(process.attributes) == {
        "messaging.system": "streamhouse",
        "messaging.destination.name": "t",
        "messaging.destination.partition.id": "0",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.client.id": "me",
        "messaging.consumer.group.name": "g",
        "messaging.streamhouse.offset": 0,
    }
    receive = traced.span("receive t")
    assert (receive.kind, ids(receive.links)) == (trace.SpanKind.CLIENT, [id_of(sent)])
    assert receive.attributes["messaging.batch.message_count"] == 1


async def test_processing_inside_a_span_of_the_application_is_its_child(platform, address, traced):
    await platform.create_topic("t", 1)
    async with Producer(address) as producer:
        await (await producer.send_many("t", [b"a", b"b"]))
    sent = traced.span("send t")
    async with Consumer(address, ["t"], stop_at_end=True) as consumer:
        with traced.tracer.start_as_current_span("job") as job, pytest.raises(ValueError):
            async for batch in consumer.batches():
                with consumer.processing(batch):
                    raise ValueError("what the application does has failed")
    process = traced.span("process t")
    assert process.parent.span_id == job.get_span_context().span_id and ids(process.links) == [id_of(sent)]
    assert process.attributes["messaging.batch.message_count"] == 2
    assert process.status.status_code is trace.StatusCode.ERROR and process.attributes["error.type"] == "ValueError"
    assert [event.name for event in process.events] == ["exception"]
    assert traced.span("receive t").parent.span_id == job.get_span_context().span_id


def test_threads_receive_in_their_own_span(server, traced):
    server.create_topic("t", 1)
    with sync.Producer(server.address) as producer:
        producer.send("t", b"a").result(30)
    consumer = sync.Consumer(server.address, ["t"], stop_at_end=True)
    with consumer, traced.tracer.start_as_current_span("thread") as thread:
        for record in consumer:
            with consumer.processing(record):
                pass
    for name in ("receive t", "process t"):
        assert traced.span(name).parent.span_id == thread.get_span_context().span_id
        assert ids(traced.span(name).links) == [id_of(traced.span("send t"))]


async def test_a_portion_is_received_once_however_often_its_turn_comes(platform, address, traced):
    await platform.create_topic("t", 2)
    async with Producer(address) as producer:
        for partition in (0, 1):
            await (await producer.send_many("t", [b"x"] * 2_000, partition=partition))
    async with Consumer(address, ["t"], stop_at_end=True) as consumer:
        count = 0
        async for _ in consumer:
            count += 1
            if count % 100 == 0:
                await asyncio.sleep(0.01)  # longer than a turn
    received = traced.spans("receive t")
    assert count == 4_000
    assert sum(span.attributes["messaging.batch.message_count"] for span in received) == 4_000


# ---- contexts of many records


def parents(headers):
    found = tracing._creation_contexts(HeadersColumn.from_list(headers))
    return [f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}" for context in found]


def a_parent(number):
    return f"00-{number + 1:032x}-{number + 1:016x}-01"


def test_creation_contexts_are_distinct_and_in_order():
    rows = [[("traceparent", a_parent(number % 5).encode()), ("x", b"y")] for number in (3, 3, 1, 4, 1)]
    assert parents([[], *rows, [("traceparenT", OTHER.encode())]]) == [a_parent(3), a_parent(1), a_parent(4)]


def test_as_many_are_linked_as_an_sdk_keeps():
    rows = [[("traceparent", a_parent(number).encode())] for number in range(1_000)]
    assert parents(rows) == [a_parent(number) for number in range(tracing.LINKS_MAX)]


@pytest.mark.parametrize(
    "value",
    [None, b"", b"x" * 55, OTHER[:-1].encode(), OTHER.encode() + b"0", b"00-" + b"0" * 32 + b"-" + b"2" * 16 + b"-01",
     b"ff" + OTHER[2:].encode(), "é".encode() * 27 + b"x"],
)  # fmt: skip
def test_a_header_that_is_no_context_is_none(value):
    assert parents([[("traceparent", value)], [("other", OTHER.encode())]]) == []


def test_what_is_written_is_what_others_read(traced):
    with traced.tracer.start_as_current_span("here") as span:
        text = tracing.traceparent_of(span)
    read = trace.get_current_span(TraceContextTextMapPropagator().extract({"traceparent": text}))
    assert id_of(read) == id_of(span) and read.get_span_context().trace_flags.sampled
