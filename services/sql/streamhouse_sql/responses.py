"""Results cut into the messages of a response stream, each of which is a whole Arrow IPC stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from shproto.errors import StatementLimit

from streamhouse_sql.arrow import to_stream

# Bytes of one response: large enough for throughput, small beside the limit of a message.
RESPONSE_BYTES = 4 * 1024 * 1024
RESPONSE_BYTES_MAX = 48 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Part of a result. `arrow_stream`: a whole Arrow IPC stream."""

    arrow_stream: bytes
    rows: int
    is_last: bool = False
    records_scanned: int = 0
    bytes_scanned: int = 0
    elapsed_ms: int = 0


def responses(schema: Any, batches: Iterator[Any]) -> Iterator[tuple[bytes, int]]:
    """Yields Arrow IPC streams of about RESPONSE_BYTES, with their numbers of rows. Raises StatementLimit for a single
    row that no message has room for."""
    for batch in batches:
        yield from _split(schema, batch)


def _split(schema: Any, batch: Any) -> Iterator[tuple[bytes, int]]:
    if batch.num_rows == 0:
        return
    if batch.nbytes > RESPONSE_BYTES and batch.num_rows > 1:
        half = batch.num_rows // 2
        yield from _split(schema, batch.slice(0, half))
        yield from _split(schema, batch.slice(half))
        return
    stream = to_stream(schema, [batch])
    if len(stream) > RESPONSE_BYTES_MAX:
        raise StatementLimit(
            f"a row of the result has {len(stream)} bytes, a message has room for {RESPONSE_BYTES_MAX}",
            limit="RESPONSE_BYTES_MAX",
            value=len(stream),
        )
    yield stream, batch.num_rows
