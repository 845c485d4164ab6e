"""A trace runs from the application that sends a record to the one that processes it, through every service.

A real OTLP receiver collects what separate processes export: producer, ingest agent, segmenter, coordinator, query
service, consumer. Spans are connected by parents and, where many records meet, by links (docs/tracing.md).
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import grpc.aio
import pytest
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from streamhouse import Admin

from tests.integration.cluster import SERVICES, Cluster
from tests.integration.processes import EmbeddedProcess

pytestmark = pytest.mark.integration

TOPIC = "traced"


class OtlpReceiver(trace_service_pb2_grpc.TraceServiceServicer, metrics_service_pb2_grpc.MetricsServiceServicer):
    """Keeps every span and the name of every metric it is sent."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.services: dict[bytes, str] = {}  # by span id
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
                names = [item.value.string_value for item in resource.resource.attributes if item.key == "service.name"]
                for scope in resource.scope_spans:
                    self.spans += scope.spans
                    self.services |= {span.span_id: names[0] for span in scope.spans}
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


# As an application sets OpenTelemetry up; `Application` gives it the collector's address and its name.
SDK = """
import asyncio, os
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from streamhouse import Consumer, Producer
provider = TracerProvider()
provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(insecure=True)))
trace.set_tracer_provider(provider)
tracer = trace.get_tracer("application")
address, topic = os.environ["ADDRESS"], os.environ["TOPIC"]
"""
SENDS = """
async def main():
    async with Producer(address, acks=os.environ["ACKS"]) as producer:
        with tracer.start_as_current_span("checkout"):
            await producer.send_and_wait(topic, b"follow me")
asyncio.run(main())
provider.shutdown()
"""
PROCESSES = """
async def main():
    async with Consumer(address, [topic], start="earliest") as consumer:
        async for record in consumer:
            with consumer.processing(record), tracer.start_as_current_span("charge"):
                assert record.value == b"follow me"
            break
asyncio.run(main())
provider.shutdown()
"""


async def application(program: str, name: str, endpoint: str, address: str, acks: str = "durable") -> None:
    """Runs an application to its end; its spans have been exported then."""
    environ = {"ADDRESS": address, "TOPIC": TOPIC, "ACKS": acks}
    environ |= {"OTEL_SERVICE_NAME": name, "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SDK + program, env=environ, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(120):
            _, said = await process.communicate()
        assert (process.returncode, said.decode()) == (0, ""), said.decode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


Tree = dict[tuple[str, str, str], "Tree"]


def tree_of(collected: OtlpReceiver, start: Span, names: Mapping[str, str], seen: set[bytes]) -> Tree:
    """Returns the spans that follow from a span: how ("child", "linked", or both), where, and the name. Only spans of
    `names`, by their service; each once, where it is met first by depth."""
    found: Tree = {}
    for span in sorted(collected.spans, key=lambda span: span.start_time_unix_nano):
        service = collected.services[span.span_id]
        is_child = span.parent_span_id == start.span_id
        is_linked = any(link.span_id == start.span_id for link in span.links)
        if span.span_id in seen or not (is_child or is_linked) or names.get(span.name) != service:
            continue
        if is_child:
            assert span.trace_id == start.trace_id
        how = " and ".join(["child"] * is_child + ["linked"] * is_linked)
        seen.add(span.span_id)
        found[how, service, span.name] = tree_of(collected, span, names, seen)
    return found


# The spans of the story; the services export their calls and statements to PostgreSQL as well.
NAMES = {
    "checkout": "shop",
    f"send {TOPIC}": "shop",
    "ingest.append": "streamhouse-ingest",
    "ingest.seal": "streamhouse-ingest",
    "segmenter.build": "streamhouse-segmenter",
    "segmenter.upload": "streamhouse-segmenter",
    "coordinator.register": "streamhouse-coordinator",
    "query.fetch": "streamhouse-query",
    "query.download": "streamhouse-query",
    f"receive {TOPIC}": "billing",
    f"process {TOPIC}": "billing",
    "charge": "billing",
}
ALL = {"STREAMHOUSE_TRACE_SAMPLE_RATIO": "1", "STREAMHOUSE_SEAL_AGE_MS": "200"}


async def test_one_trace_through_separate_services(
    receiver: tuple[OtlpReceiver, str], tmp_path: Path, storage: dict[str, str]
) -> None:
    collected, endpoint = receiver
    environ = {**storage, **ALL, "STREAMHOUSE_OTLP_ENDPOINT": endpoint}
    cluster = Cluster(environ, tmp_path, dict.fromkeys(SERVICES, 1))
    try:
        await cluster.start()
        async with Admin(cluster.bootstrap) as admin:
            await admin.create_topic(TOPIC, partitions=1)
        await application(SENDS, "shop", endpoint, cluster.bootstrap)
        await application(PROCESSES, "billing", endpoint, cluster.bootstrap)
        assert set((await cluster.stop()).values()) == {0}  # which exports what is left
    finally:
        cluster.kill_all()
    (checkout,) = [span for span in collected.spans if span.name == "checkout"]
    assert tree_of(collected, checkout, NAMES, set()) == {
        ("child", "shop", f"send {TOPIC}"): {
            ("child", "streamhouse-ingest", "ingest.append"): {
                ("linked", "streamhouse-ingest", "ingest.seal"): {
                    ("child", "streamhouse-segmenter", "segmenter.build"): {},
                    ("child", "streamhouse-segmenter", "segmenter.upload"): {
                        ("child", "streamhouse-coordinator", "coordinator.register"): {
                            ("linked", "streamhouse-query", "query.fetch"): {
                                ("child", "streamhouse-query", "query.download"): {}
                            }
                        }
                    },
                }
            },
            ("linked", "billing", f"receive {TOPIC}"): {},
            ("child and linked", "billing", f"process {TOPIC}"): {("child", "billing", "charge"): {}},
        }
    }


async def test_a_fetch_of_the_tail_is_linked_to_the_append(receiver: tuple[OtlpReceiver, str], tmp_path: Path) -> None:
    collected, endpoint = receiver
    environ = {**ALL, "STREAMHOUSE_SEAL_AGE_MS": "600000", "STREAMHOUSE_OTLP_ENDPOINT": endpoint}
    server = EmbeddedProcess(tmp_path / "data", tmp_path, environ)
    await server.start_serving()
    try:
        async with Admin(server.address) as admin:
            await admin.create_topic(TOPIC, partitions=1)
        await application(SENDS, "shop", endpoint, server.address, "wal")
        await application(PROCESSES, "billing", endpoint, server.address)
    finally:
        assert await server.stop() == 0, server.log_tail()
    names = {name: "streamhouse-embedded" if "." in name else service for name, service in NAMES.items()}
    (append,) = [span for span in collected.spans if span.name == "ingest.append"]
    following = tree_of(collected, append, names, set())
    assert ("linked", "streamhouse-embedded", "query.fetch") in following, following
    wanted = {"streamhouse_ingest_records_total", "streamhouse_segmenter_uploaded_bytes"}
    assert wanted <= collected.metrics, sorted(collected.metrics)
