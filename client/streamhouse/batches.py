"""A producer's batch: gathered, encoded, and re-encoded when it gets another number."""

from shformat import Codec, FormatError, ProducerStamp, decode_batch, encode_batch
from shproto.errors import InvalidBatch

from streamhouse.core.accumulator import RECORD_BYTES_MAX, Gathering
from streamhouse.delivery import Delivery


class Batch:
    """Holds the records until first encoded, then the bytes; nothing once delivered. trace_headers: whether records get
    the context of the span that they are sent in."""

    __slots__ = ("_encoded", "_gathering", "_stamp", "_trace_headers", "delivery", "is_sent", "size_bytes")

    def __init__(self, gathering: Gathering[Delivery], *, trace_headers: bool = True) -> None:
        self.delivery = gathering.delivery
        self.size_bytes = gathering.size_bytes
        self.is_sent = False  # handed to a leader's stream at least once
        self._trace_headers = trace_headers
        self._gathering: Gathering[Delivery] | None = gathering
        self._encoded = b""
        self._stamp: ProducerStamp | None = None

    def encode(self, stamp: ProducerStamp | None, codec: Codec) -> bytes:
        """The very same bytes for the same stamp. Raises InvalidBatch."""
        try:
            if self._gathering is not None:
                self._add_contexts(self._gathering)
                self._encoded = self._gathering.encode(codec, stamp)
                self._gathering = None
            elif stamp != self._stamp:
                self._encoded = encode_batch(decode_batch(self._encoded), codec=codec, producer=stamp)
        except FormatError as error:
            raise InvalidBatch(f"the records cannot be encoded: {error}", what=error.what) from error
        self._stamp = stamp
        return self._encoded

    def _add_contexts(self, gathering: Gathering[Delivery]) -> None:
        """Gives the records the contexts of their spans, where the batch has room for them: what the application was
        told to fit is sent in any case."""
        if self._trace_headers and (trace := self.delivery.trace) is not None:
            count, size_bytes = len(gathering.values), gathering.size_bytes
            gathering.headers = trace.with_contexts(gathering.headers, count, size_bytes, RECORD_BYTES_MAX)

    @property
    def traceparent(self) -> str:
        """W3C traceparent of the span that the leader's work belongs to; empty if nothing is recorded."""
        return "" if self.delivery.trace is None else self.delivery.trace.traceparent

    def end_spans(self) -> None:
        """Ends the spans of the batch with its outcome."""
        delivery = self.delivery
        if delivery.trace is not None:
            delivery.trace.end(delivery.error, delivery.base_offset, delivery.record_count)
