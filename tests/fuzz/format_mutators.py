"""Changes to batches, log files and segments by somebody who has read docs/formats. The caller repairs checksums."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from random import Random

import lz4.block
import numpy as np
import zstandard
from shformat import Codec
from shformat.batch_header import BATCH_HEADER_SIZE
from shformat.segment import SEGMENT_FOOTER_SIZE, SEGMENT_HEADER_SIZE
from shformat.segment_index import INDEX_ENTRY_SIZE
from shformat.varint import encode_varints
from shformat.wal import FRAME_HEADER_SIZE

from tests.fuzz.bytes_mutator import EDGES, mutate_bytes, mutate_field
from tests.fuzz.checksums import batch_spans, frame_size, frame_starts, index_entries

Fields = tuple[tuple[int, str], ...]

BATCH_FIELDS: Fields = (
    (0, "q"), (8, "Q"), (24, "B"), (25, "B"), (26, "H"), (28, "I"), (32, "I"), (36, "I"), (40, "q"), (48, "q"),
    (56, "q"), (64, "q"), (72, "q"), (80, "I"),
)  # fmt: skip
FILE_FIELDS: Fields = ((4, "H"), (6, "H"), (8, "Q"), (24, "Q"), (32, "Q"))
FRAME_FIELDS: Fields = ((0, "I"), (12, "I"), (16, "Q"), (32, "I"), (36, "I"), (40, "Q"), (48, "q"))
SEGMENT_FIELDS: Fields = (
    (4, "H"), (6, "B"), (7, "B"), (8, "Q"), (24, "I"), (28, "Q"), (36, "q"), (44, "q"), (52, "Q"),
)  # fmt: skip
ENTRY_FIELDS: Fields = (
    (0, "q"), (8, "q"), (16, "Q"), (24, "q"), (32, "q"), (40, "Q"), (48, "I"), (52, "I"), (56, "I"),
)  # fmt: skip
FOOTER_FIELDS: Fields = ((0, "Q"), (8, "I"), (12, "I"), (20, "H"), (22, "H"))

_PAYLOAD_BYTES_MAX = 1 << 20
_SECTIONS = 7
_HEADERS_SECTION = 4
_HEADER_SECTIONS = 5


def _field(data: bytearray, at: int, fields: Fields, rng: Random) -> bytearray:
    offset, form = rng.choice(fields)
    mutate_field(data, at + offset, form, rng)
    return data


# ---- batches


def mutate_batches(data: bytes, rng: Random) -> bytes:
    """One change to one of back-to-back batches: a header field, its payload, or its place among the others."""
    spans = list(batch_spans(data))
    if not spans or rng.random() < 0.1:
        return mutate_bytes(data, rng)
    start, end = rng.choice(spans)
    batch = data[start:end]
    match rng.randrange(10):
        case 0 | 1 | 2:
            batch = bytes(_field(bytearray(batch), 0, BATCH_FIELDS, rng))
        case 3:
            batch = batch + batch
        case 4:
            other = rng.choice(spans)
            batch = batch + data[other[0] : other[1]]
        case 5:
            batch = b""
        case _:
            batch = mutate_payload(batch, rng)
    return data[:start] + batch + data[end:]


def mutate_payload(batch: bytes, rng: Random) -> bytes:
    """The batch around a changed payload, sizes made to fit; compressed or not, by chance."""
    payload = _payload_of(batch)
    if payload is None:
        return mutate_bytes(batch, rng)
    payload = _mutate_sections(payload, _SECTIONS, rng, nested=True)
    # Half of them not compressed: later changes then reach the columns.
    codec = rng.choice((Codec.NONE, rng.choice((Codec.LZ4, Codec.ZSTD, Codec.GZIP))))
    stored = _COMPRESS[codec](payload)
    if codec is not Codec.NONE and rng.random() < 0.1:
        stored = mutate_bytes(stored, rng)
    whole = bytearray(batch[:BATCH_HEADER_SIZE] + stored)
    whole[25] = codec
    struct.pack_into("<II", whole, 28, len(whole), len(payload))
    return bytes(whole)


def _payload_of(batch: bytes) -> bytes | None:
    stored = batch[BATCH_HEADER_SIZE:]
    expand = _EXPAND.get(batch[25])
    if len(batch) <= BATCH_HEADER_SIZE or expand is None:
        return stored or None
    (size_bytes,) = struct.unpack_from("<I", batch, 32)
    if size_bytes > _PAYLOAD_BYTES_MAX:
        return None
    try:
        return expand(stored, size_bytes)
    except (lz4.block.LZ4BlockError, zstandard.ZstdError, zlib.error):
        return None


_COMPRESS: dict[Codec, Callable[[bytes], bytes]] = {
    Codec.NONE: bytes,
    Codec.LZ4: lambda payload: bytes(lz4.block.compress(payload, store_size=False)),
    Codec.ZSTD: lambda payload: zstandard.ZstdCompressor().compress(payload),
    Codec.GZIP: lambda payload: zlib.compress(payload, wbits=31),
}
# Of what a mutation has made: no more than size_bytes whatever is in it.
_EXPAND: dict[int, Callable[[bytes, int], bytes]] = {
    Codec.LZ4: lambda stored, size_bytes: bytes(lz4.block.decompress(stored, uncompressed_size=size_bytes)),
    Codec.ZSTD: lambda stored, size_bytes: zstandard.ZstdDecompressor().stream_reader(stored).read(size_bytes),
    Codec.GZIP: lambda stored, size_bytes: zlib.decompressobj(31).decompress(stored, max(size_bytes, 1)),
}


def _mutate_sections(data: bytes, count: int, rng: Random, *, nested: bool) -> bytes:
    """One section changed, and the table of sizes with it; sometimes the table alone."""
    table = struct.Struct(f"<{count}I")
    if len(data) < table.size:
        return mutate_bytes(data, rng)
    if rng.random() < 0.1:
        return bytes(_field(bytearray(data), 0, tuple((4 * i, "I") for i in range(count)), rng))
    sections, at = [], table.size
    for size in table.unpack_from(data):
        sections.append(data[at : at + size])
        at += size
    chosen = rng.randrange(count)
    if nested and chosen == _HEADERS_SECTION and rng.random() < 0.8:
        sections[chosen] = _mutate_sections(sections[chosen], _HEADER_SECTIONS, rng, nested=False)
    else:
        sections[chosen] = _mutate_column(sections[chosen], rng)
    return table.pack(*map(len, sections)) + b"".join(sections)


def _mutate_column(section: bytes, rng: Random) -> bytes:
    """Other bytes, other varints, or the same number of them."""
    match rng.randrange(4):
        case 0:
            return _varints(rng, 1 + rng.randrange(8))
        case 1:
            return _varints(rng, sum(byte < 0x80 for byte in section))
        case 2:
            return section + _varints(rng, 1)
        case _:
            return mutate_bytes(section, rng)


def _varints(rng: Random, count: int) -> bytes:
    numbers = [rng.choice(EDGES) if rng.random() < 0.3 else rng.randrange(8) for _ in range(min(count, 4096))]
    return encode_varints(np.array([number % (1 << 64) for number in numbers], np.uint64))


# ---- log files


def mutate_wal(data: bytes, rng: Random) -> bytes:
    """One change to the file header, to a frame, to the batch in it, or to the order of frames."""
    starts = list(frame_starts(data))
    if not starts or rng.random() < 0.15:
        return mutate_bytes(data, rng)
    if rng.random() < 0.1:
        return bytes(_field(bytearray(data), 0, FILE_FIELDS, rng))
    at = rng.choice(starts)
    end = min(at + max(frame_size(data, at), FRAME_HEADER_SIZE), len(data))
    frame = data[at:end]
    match rng.randrange(10):
        case 0 | 1:
            frame = bytes(_field(bytearray(frame), 0, FRAME_FIELDS, rng))
        case 2:
            frame = frame + frame
        case 3:
            frame = frame[: rng.randrange(len(frame) + 1)]
        case 4:
            frame = _framed(frame, frame[FRAME_HEADER_SIZE:] + frame)
        case 5:
            frame = rng.randbytes(rng.randrange(64)) + frame
        case 6:
            return data[: rng.randrange(at, end + 1)] + bytes(rng.choice((1, 512, 4096, 9000)))
        case 7:
            frame = frame[:15] + bytes([frame[15] ^ 0x80]) + frame[16:]
        case _:
            frame = _framed(frame, mutate_batches(frame[FRAME_HEADER_SIZE:], rng))
    return data[:at] + frame + data[end:]


def _framed(frame: bytes, batch: bytes) -> bytes:
    changed = bytearray(frame[:FRAME_HEADER_SIZE])
    struct.pack_into("<I", changed, 12, FRAME_HEADER_SIZE + len(batch))
    return bytes(changed) + batch


# ---- segments


def mutate_segment(data: bytes, rng: Random) -> bytes:
    """One change to header, index, footer or a block; a block of another size moves everything behind it."""
    entries = index_entries(data)
    if not entries or rng.random() < 0.1:
        return mutate_bytes(data, rng)
    changed = bytearray(data)
    at = rng.choice(entries)
    match rng.randrange(8):
        case 0 | 1:
            return bytes(_field(changed, 0, SEGMENT_FIELDS, rng))
        case 2 | 3:
            return bytes(_field(changed, at, ENTRY_FIELDS, rng))
        case 4:
            return bytes(_field(changed, len(changed) - SEGMENT_FOOTER_SIZE, FOOTER_FIELDS, rng))
        case 5:
            return _with_entries(data, entries, [e for e in entries if e != at or rng.random() < 0.5] + [at])
        case _:
            return _with_other_block(data, entries, at, rng)


def _with_entries(data: bytes, entries: range, chosen: list[int]) -> bytes:
    index = b"".join(data[at : at + INDEX_ENTRY_SIZE] for at in chosen)
    footer = bytearray(data[-SEGMENT_FOOTER_SIZE:])
    struct.pack_into("<II", footer, 8, len(index), len(chosen))
    return data[: entries.start] + index + bytes(footer)


def _with_other_block(data: bytes, entries: range, entry_at: int, rng: Random) -> bytes:
    (block_at,) = struct.unpack_from("<Q", data, entry_at + 16)
    (size_bytes,) = struct.unpack_from("<I", data, entry_at + 48)
    if not SEGMENT_HEADER_SIZE <= block_at <= block_at + size_bytes <= entries.start:
        return mutate_bytes(data, rng)
    block = mutate_batches(data[block_at : block_at + size_bytes], rng)
    moved = len(block) - size_bytes
    tail = bytearray(data[entries.start :])
    for at in entries:
        relative = at - entries.start
        (start,) = struct.unpack_from("<Q", tail, relative + 16)
        if at == entry_at:
            struct.pack_into("<I", tail, relative + 48, len(block))
        elif start > block_at and start + moved >= 0:
            struct.pack_into("<Q", tail, relative + 16, (start + moved) % (1 << 64))
    footer_at = len(tail) - SEGMENT_FOOTER_SIZE
    struct.pack_into("<Q", tail, footer_at, entries.start + moved)
    return data[:block_at] + block + data[block_at + size_bytes : entries.start] + bytes(tail)
