"""OpenTelemetry for a process, and the trace context that travels in events.

Modules take their tracer and meter from the OpenTelemetry API (`trace.get_tracer`, `metrics.get_meter`); until
`Telemetry.configure` installs the SDK these are no-ops, so that telemetry that is off costs nothing measurable.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

import grpc.aio
from opentelemetry import metrics, trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from shruntime.counters import start_at_zero
from shruntime.settings import CommonSettings

log = logging.getLogger(__name__)

_PROPAGATOR = TraceContextTextMapPropagator()


def current_traceparent() -> str:
    """Returns the W3C traceparent of the current span; empty if nothing is recorded."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return carrier.get("traceparent", "")


def context_of(traceparent: str) -> Context:
    """Returns a context to start child spans in; an empty or malformed traceparent gives a new context."""
    return _PROPAGATOR.extract({"traceparent": traceparent}, context=Context())


def links_to(traceparents: Sequence[str]) -> list[trace.Link]:
    """Returns links to the spans named, without malformed ones."""
    contexts = (trace.get_current_span(context_of(parent)).get_span_context() for parent in traceparents)
    return [trace.Link(context) for context in contexts if context.is_valid]


def _is_no_cut_stream(record: logging.LogRecord) -> bool:
    """False for a record of the gRPC instrumentation about a stream whose client has gone: it logs a traceback for
    each, because the generator is closed by another task than the task that attached the context."""
    return record.getMessage() != "Failed to detach context"


class Telemetry:
    """The installed exporters; `shutdown` flushes them."""

    def __init__(self, enabled: bool, flush_timeout_ms: int = 0) -> None:
        self.enabled = enabled
        self._flush_timeout_ms = flush_timeout_ms

    @classmethod
    def configure(cls, service: str, settings: CommonSettings) -> Telemetry:
        """Installs exporters by the settings, and returns them; call once per process, before channels and servers
        are made."""
        if not settings.is_measured:
            return cls(enabled=False)
        from shruntime import _telemetry_sdk  # the SDK is only imported where it is used

        _telemetry_sdk.install(service, settings)
        start_at_zero()
        return cls(enabled=True, flush_timeout_ms=settings.otlp_flush_timeout_ms)

    def client(self) -> Sequence[grpc.aio.ClientInterceptor]:
        """Returns interceptors for outgoing gRPC calls."""
        if not self.enabled:
            return ()
        from opentelemetry.instrumentation.grpc import aio_client_interceptors

        return list(aio_client_interceptors())  # type: ignore[no-untyped-call]

    def server(self) -> Sequence[grpc.aio.ServerInterceptor[Any, Any]]:
        """Returns interceptors for incoming gRPC calls."""
        if not self.enabled:
            return ()
        from opentelemetry.instrumentation.grpc import aio_server_interceptor

        logging.getLogger("opentelemetry.context").addFilter(_is_no_cut_stream)
        return [aio_server_interceptor()]  # type: ignore[no-untyped-call]

    def shutdown(self) -> None:
        """Flushes buffered data, for at most otlp_flush_timeout_ms; safe to call if telemetry is off."""
        if not self.enabled:
            return
        # Daemon threads: an exporter that hangs must not keep the process from ending.
        stops = [
            threading.Thread(target=stop, name="telemetry shutdown", daemon=True)
            for provider in (trace.get_tracer_provider(), metrics.get_meter_provider())
            if (stop := getattr(provider, "shutdown", None)) is not None
        ]
        deadline_s = time.monotonic() + self._flush_timeout_ms / 1000
        for thread in stops:  # concurrently: a dead collector costs the time once
            thread.start()
        for thread in stops:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        if any(thread.is_alive() for thread in stops):
            log.warning(
                "the last traces and metrics are dropped: the collector has not taken them within "
                "otlp_flush_timeout_ms = %d",
                self._flush_timeout_ms,
            )
