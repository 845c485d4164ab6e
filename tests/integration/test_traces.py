"""One trace runs from the producer's send to the registered segment, and from the consumer to the object store.

A real OTLP receiver collects what the platform's process and this process (producer, consumer) export. Spans are
connected by parents and, where many appends meet in one sealed buffer, by links.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from streamhouse import Admin, Consumer, Producer

from tests.integration.processes import EmbeddedProcess

pytestmark = pytest.mark.integration

TOPIC = "traced"


class OtlpReceiver(trace_service_pb2_grpc.TraceServiceServicer, metrics_service_pb2_grpc.MetricsServiceServicer):
    """Keeps every span and the name of every metric it is sent."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.metrics: set[str] = set()

    async def start(self) -> str:
        self._server = grpc.aio.server()
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(self, self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return f"http://127.0.0.1:{port}"

    async def stop(self) -> None:
        await self._server.stop(0)

    async def Export(self, request, context):  # type: ignore[no-untyped-def]
        if isinstance(request, trace_service_pb2.ExportTraceServiceRequest):
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    self.spans += scope.spans
            return trace_service_pb2.ExportTraceServiceResponse()
        for resource in request.resource_metrics:
            for scope in resource.scope_metrics:
                self.metrics |= {metric.name for metric in scope.metrics}
        return metrics_service_pb2.ExportMetricsServiceResponse()


@pytest.fixture
async def receiver() -> AsyncIterator[tuple[OtlpReceiver, str]]:
    receiver = OtlpReceiver()
    endpoint = await receiver.start()
    yield receiver, endpoint
    await receiver.stop()


def reachable(spans: list[Span], start: bytes) -> set[str]:
    """Names of the spans that follow from span `start`: its children, and those linked to what was reached."""
    reached, names = {start}, set()
    grown = True
    while grown:
        grown = False
        for span in spans:
            causes = {span.parent_span_id, *(link.span_id for link in span.links)}
            if span.span_id not in reached and causes & reached:
                reached.add(span.span_id)
                names.add(span.name)
                grown = True
    return names


async def test_one_trace_from_send_to_registration(
    receiver: tuple[OtlpReceiver, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collected, endpoint = receiver
    mine = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(mine))
    monkeypatch.setattr("streamhouse.batches._TRACER", provider.get_tracer("streamhouse.client"))
    environ = {
        "STREAMHOUSE_OTLP_ENDPOINT": endpoint,
        "STREAMHOUSE_TRACE_SAMPLE_RATIO": "1",
        "STREAMHOUSE_SEAL_AGE_MS": "200",
    }
    server = EmbeddedProcess(tmp_path / "data", tmp_path, environ)
    await server.start_serving()
    async with Admin(server.address) as admin:
        await admin.create_topic(TOPIC, partitions=1)
    async with Producer(server.address, acks="durable") as producer:
        sent = await producer.send(TOPIC, value=b"follow me")
        assert (await sent).offset == 0
    async with Consumer(server.address, [TOPIC], start="earliest") as consumer:
        async with asyncio.timeout(30):
            async for record in consumer:
                assert record.value == b"follow me"
                break
    assert await server.stop() == 0, server.log_tail()  # the shutdown flushes the exporters

    (produce,) = [span for span in mine.get_finished_spans() if span.name == "produce"]
    span_id = produce.context.span_id.to_bytes(8, "big")
    followed = reachable(collected.spans, span_id)
    expected = {"ingest.append", "ingest.seal", "segmenter.build", "segmenter.upload", "coordinator.register"}
    assert expected <= followed, f"missing {expected - followed}; all: {sorted({s.name for s in collected.spans})}"

    fetches = [span for span in collected.spans if span.name == "query.fetch"]
    downloads = {span.parent_span_id for span in collected.spans if span.name == "query.download"}
    assert downloads & {span.span_id for span in fetches}, "the read of a cold segment shows its download"
    wanted = {"streamhouse_ingest_records_total", "streamhouse_segmenter_uploaded_bytes"}
    assert wanted <= collected.metrics, sorted(collected.metrics)
