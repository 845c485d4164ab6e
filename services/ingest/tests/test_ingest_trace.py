"""One trace from the producer's span through the append to the seal and what is announced."""

import asyncio
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from shformat import Records, encode_batch
from shproto.v1 import ingest_pb2 as pb
from shproto.v1 import types_pb2
from shruntime.telemetry import current_traceparent
from streamhouse_ingest.log.logs import LINKS_MAX
from streamhouse_ingest.produce import service
from streamhouse_ingest.sealing import sealer

from services.ingest.tests.ingest_agents import eventually, kill, started
from services.ingest.tests.ingest_world import World


async def test_append_and_seal_are_linked_to_the_producers_span(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
):
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")
    monkeypatch.setattr(service, "tracer", tracer)
    monkeypatch.setattr(sealer, "tracer", tracer)
    await world.create_topic()
    agent = await started(tmp_path, world.coordinator, seal_age_ms=600_000)
    await eventually(lambda: agent.agent.running().logs.led("orders", 0) is not None)
    batch = encode_batch(Records.from_lists([b"v"]))
    await agent.api.produce(pb.ProduceRequest(topic="orders", batch=batch))
    with tracer.start_as_current_span("produce") as produce:
        context = current_traceparent()
    requests = [pb.ProduceRequest(topic="orders", batch=batch, trace_context=context) for _ in range(LINKS_MAX + 8)]
    await asyncio.gather(*map(agent.api.produce, requests))
    # A waiting durable ack has the buffer sealed now, with all that was appended before it.
    durable = asyncio.create_task(
        agent.api.produce(pb.ProduceRequest(topic="orders", batch=batch, acks=types_pb2.ACKS_DURABLE))
    )
    await eventually(lambda: world.buffers)
    (announced,) = world.buffers.values()
    durable.cancel()
    await asyncio.gather(durable, return_exceptions=True)
    await kill(agent)
    spans = exporter.get_finished_spans()
    appends = [span for span in spans if span.name == "ingest.append"]
    (seal,) = (span for span in spans if span.name == "ingest.seal")
    assert len(appends) == LINKS_MAX + 8, "none for the batch whose producer records nothing"
    trace_id = produce.get_span_context().trace_id
    assert {span.parent.span_id for span in appends if span.parent} == {produce.get_span_context().span_id}
    assert {span.get_span_context().trace_id for span in appends} == {trace_id}
    assert len(seal.links) == LINKS_MAX
    assert {link.context.trace_id for link in seal.links} == {trace_id}
    assert announced.trace_context.split("-")[1] == trace.format_trace_id(seal.get_span_context().trace_id)
