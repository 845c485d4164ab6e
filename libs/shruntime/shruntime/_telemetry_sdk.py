"""Installs the OpenTelemetry SDK: OTLP traces and metrics, and a Prometheus endpoint."""

from opentelemetry import metrics, trace
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

from shruntime.metrics_page import serve_metrics
from shruntime.settings import CommonSettings


def install(service: str, settings: CommonSettings) -> None:
    """Sets the global tracer and meter providers; raises OSError if the Prometheus port is taken.

    `Telemetry.shutdown` shuts them down, within its time limit; their own handlers at exit would have none.
    """
    resource = Resource.create({"service.name": f"streamhouse-{service}", "service.instance.id": settings.advertise})
    readers: list[MetricReader] = []
    if settings.otlp_endpoint:
        exporter = OTLPSpanExporter(endpoint=settings.otlp_endpoint, insecure=_insecure(settings.otlp_endpoint))
        provider = TracerProvider(
            resource=resource, sampler=ParentBasedTraceIdRatio(settings.trace_sample_ratio), shutdown_on_exit=False
        )
        provider.add_span_processor(BatchSpanProcessor(exporter))
        trace.set_tracer_provider(provider)
        metric_exporter = OTLPMetricExporter(
            endpoint=settings.otlp_endpoint, insecure=_insecure(settings.otlp_endpoint)
        )
        readers.append(PeriodicExportingMetricReader(metric_exporter))
    if settings.prometheus_listen:
        host, _, port = settings.prometheus_listen.rpartition(":")
        readers.append(PrometheusMetricReader())
        serve_metrics(host.strip("[]"), int(port))
    metrics.set_meter_provider(MeterProvider(readers, resource, shutdown_on_exit=False))


def _insecure(endpoint: str) -> bool:
    return not endpoint.startswith("https://")
