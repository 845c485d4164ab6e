"""A producer's batch: gathered, encoded, re-encoded when it gets another number, and its `produce` span."""

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from shformat import Codec, FormatError, ProducerStamp, decode_batch, encode_batch
from shproto.errors import InvalidBatch

from streamhouse.core.accumulator import Gathering
from streamhouse.delivery import Delivery

_TRACER = trace.get_tracer("streamhouse.client")
_PROPAGATOR = TraceContextTextMapPropagator()


class Batch:
    """Holds the records until first encoded, then the bytes; nothing once delivered."""

    __slots__ = ("_encoded", "_gathering", "_stamp", "delivery", "is_sent", "size_bytes", "span")

    def __init__(self, gathering: Gathering[Delivery]) -> None:
        self.delivery = gathering.delivery
        self.size_bytes = gathering.size_bytes
        self.is_sent = False  # handed to a leader's stream at least once
        self.span: trace.Span | None = None
        self._gathering: Gathering[Delivery] | None = gathering
        self._encoded = b""
        self._stamp: ProducerStamp | None = None

    def encode(self, stamp: ProducerStamp | None, codec: Codec) -> bytes:
        """The very same bytes for the same stamp. Raises InvalidBatch."""
        try:
            if self._gathering is not None:
                self._encoded = self._gathering.encode(codec, stamp)
                self._gathering = None
            elif stamp != self._stamp:
                self._encoded = encode_batch(decode_batch(self._encoded), codec=codec, producer=stamp)
        except FormatError as error:
            raise InvalidBatch(f"the records cannot be encoded: {error}", what=error.what) from error
        self._stamp = stamp
        return self._encoded

    def start_span(self, record_count: int, acks: str, client_id: str) -> str:
        """One span per batch, from first sending to its outcome; free while telemetry is off. Returns the W3C
        traceparent for the leader, empty when nothing is recorded."""
        if self.span is None:
            self.span = _TRACER.start_span("produce", kind=trace.SpanKind.PRODUCER)
        if not self.span.is_recording():
            return ""
        self.span.set_attributes(
            {
                "messaging.system": "streamhouse",
                "messaging.destination.name": self.delivery.topic,
                "messaging.destination.partition.id": str(self.delivery.partition),
                "messaging.batch.message_count": record_count,
                "messaging.client.id": client_id,
                "streamhouse.acks": acks,
            }
        )
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, trace.set_span_in_context(self.span))
        return carrier.get("traceparent", "")

    def end_span(self, error: Exception | None) -> None:
        if self.span is None:
            return
        if error is not None and self.span.is_recording():
            self.span.record_exception(error)
            self.span.set_status(trace.StatusCode.ERROR, str(error))
        self.span.end()
