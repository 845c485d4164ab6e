"""Values of records: a name that is unique in the run, and bytes that depend on it, so that damage shows."""

from collections.abc import Iterable
from zlib import crc32

PADDING_BYTES_MAX = 200


def payload_of(name: str) -> bytes:
    """The record's value: the name, and up to PADDING_BYTES_MAX bytes made from it."""
    seed = crc32(name.encode())
    return b"%b|%b" % (name.encode(), bytes([33 + seed % 90]) * (seed % PADDING_BYTES_MAX))


def name_of(payload: bytes | None) -> str:
    """The name; for bytes that no `payload_of` makes, something that no producer ever sent."""
    name = (payload or b"").partition(b"|")[0].decode(errors="replace")
    return name if payload == payload_of(name) else f"damaged:{(payload or b'null')[:60]!r}"


def names_of(payloads: Iterable[bytes | None]) -> tuple[str, ...]:
    return tuple(map(name_of, payloads))
