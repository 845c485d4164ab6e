"""A size that is only claimed is never allocated: every number of the formats at its edges, with the default limits.

The other memory test draws changes at random; this one leaves no field out, one at a time and behind correct checksums.
"""

import struct
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from shformat import (
    FormatError,
    decode_batch,
    decode_wal_file_header,
    describe_wal_file,
    open_segment,
    read_block,
    run_plan,
    scan_frames,
    split_batches,
    validate_batch,
)
from shformat.limits import DEFAULT_LIMITS
from shformat.segment import SEGMENT_FOOTER_SIZE
from shformat.wal import FRAME_HEADER_SIZE

from tests.fuzz import checksums
from tests.fuzz.format_mutators import (
    BATCH_FIELDS,
    ENTRY_FIELDS,
    FILE_FIELDS,
    FOOTER_FIELDS,
    FRAME_FIELDS,
    SEGMENT_FIELDS,
    Fields,
)
from tests.fuzz.targets import load

# Limits that sizes are checked against, the edges of their types, and what is likely to be multiplied.
CLAIMS = sorted(
    {0, 1, 1 << 16, 1 << 20, 1 << 24, 1 << 28, (1 << 31) - 1, (1 << 32) - 1, (1 << 63) - 1, (1 << 64) - 1}
    | {getattr(DEFAULT_LIMITS, name) for name in DEFAULT_LIMITS.__slots__}
)
# Inputs have a few KB. LZ4 stands for 255 bytes per byte at most, and a decoder may hold the result, its columns and
# the lists of a description side by side.
TIMES_INPUT = 1024
ANYWAY_BYTES = 1024 * 1024

Readers = tuple[Callable[[bytes], Any], ...]


def read_segment(data: bytes) -> None:
    def read(at: int, size_bytes: int) -> bytes:
        assert at >= 0 and size_bytes >= 0 and at + size_bytes <= len(data), "read outside of the segment"
        return data[at : at + size_bytes]

    _, index = run_plan(open_segment(len(data)), read)
    for entry in index:
        run_plan(read_block(entry), read)


def batch_places(data: bytes) -> Iterator[tuple[int, Fields]]:
    for at, _ in checksums.batch_spans(data):
        yield at, BATCH_FIELDS


def wal_places(data: bytes) -> Iterator[tuple[int, Fields]]:
    yield 0, FILE_FIELDS
    for at in checksums.frame_starts(data):
        yield at, FRAME_FIELDS
        yield at + FRAME_HEADER_SIZE, BATCH_FIELDS


def segment_places(data: bytes) -> Iterator[tuple[int, Fields]]:
    yield 0, SEGMENT_FIELDS
    yield len(data) - SEGMENT_FOOTER_SIZE, FOOTER_FIELDS
    for at in checksums.index_entries(data):
        yield at, ENTRY_FIELDS


FORMATS: dict[str, tuple[Callable[[bytes], Iterator[tuple[int, Fields]]], Readers]] = {
    "batch": (batch_places, (validate_batch, decode_batch, split_batches)),
    "wal": (wal_places, (decode_wal_file_header, lambda data: list(scan_frames(data)), describe_wal_file)),
    "segment": (segment_places, (read_segment,)),
}


def with_claims(data: bytes, places: Iterator[tuple[int, Fields]]) -> Iterator[tuple[str, bytes]]:
    """(what was changed, the input), for every field and every claim that fits it."""
    for at, fields in places:
        for offset, form in fields:
            packer = struct.Struct("<" + form)
            for claim in CLAIMS:
                if claim >> (packer.size * 8 - form.islower()) == 0 and at + offset + packer.size <= len(data):
                    changed = bytearray(data)
                    packer.pack_into(changed, at + offset, claim)
                    yield f"{claim} at byte {at} + {offset}", bytes(changed)


@pytest.mark.long  # each length field of each seed with each claim: a sweep
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_only_claimed_is_not_allocated(name: str) -> None:
    target, (places, readers) = load(name), FORMATS[name]
    for read in readers:  # what a first call imports and caches is nobody's claim
        read_or_refuse(read, target.seeds()[0])
    tried = 0
    tracemalloc.start()
    try:
        for seed in target.seeds():
            for what, changed in with_claims(seed, places(seed)):
                data = target.repair(changed)
                for read in readers:
                    tracemalloc.reset_peak()
                    before = tracemalloc.get_traced_memory()[0]
                    read_or_refuse(read, data)
                    grown = tracemalloc.get_traced_memory()[1] - before
                    assert grown <= ANYWAY_BYTES + TIMES_INPUT * len(data), f"{what}: {grown} bytes for {len(data)}"
                    tried += 1
    finally:
        tracemalloc.stop()
    assert tried > 100


def read_or_refuse(read: Callable[[bytes], Any], data: bytes) -> None:
    try:
        read(data)
    except FormatError:
        return
