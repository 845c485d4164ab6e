"""Golden files: bytes written by older versions stay readable, and what is written today is the same bytes.

Run this file as a script to write golden files that do not exist yet; existing ones are never rewritten.
What a codec makes of a payload may differ between its releases, so for compressed batches the payload is
compared after decompression.
"""

import gzip
import re
import sys
from collections.abc import Callable
from pathlib import Path

import lz4.block
import pytest
import zstandard
from shformat import (
    BATCH_HEADER_SIZE,
    Codec,
    ProducerStamp,
    Records,
    SegmentBuilder,
    SpaceAhead,
    WalFileHeader,
    WalFrame,
    decode_batch,
    decode_wal_file_header,
    encode_batch,
    encode_frame_header,
    encode_wal_file_header,
    open_segment,
    read_batch_header,
    read_block,
    run_plan,
    scan_frames,
    validate_batch,
)

pytestmark = pytest.mark.quick

GOLDEN = Path(__file__).parent / "golden"
INT64_MAX = (1 << 63) - 1
INT64_MIN = -(1 << 63)
TOPIC = bytes.fromhex("0f1e2d3c4b5a69788796a5b4c3d2e1f0")

Rows = list[tuple[int, int, bytes | None, bytes | None, list[tuple[str, bytes | None]]]]

PLAIN: Rows = [(1000 + n, 1_700_000_000_000 + 3 * n, None, b'{"id":%d}' % n, []) for n in range(20)]
EDGES: Rows = [
    (0, INT64_MIN, None, None, []),
    (1, INT64_MAX, b"", b"", [("", None)]),
    (500, -1, b"key", b"value", [("trace", b"\x00\xff"), ("trace", b""), ("größe", None)]),
    (INT64_MAX - 1, 0, "schlüssel".encode(), b"v" * 300, []),
]


def records_of(rows: Rows) -> Records:
    offsets, timestamps, keys, values, headers = (list(column) for column in zip(*rows, strict=True))
    return Records.from_lists(values, keys, timestamps, headers, offsets)


def rows_of(records: Records) -> Rows:
    headers = [[] for _ in range(len(records))] if records.headers is None else records.headers.to_list()
    columns = (records.offsets.tolist(), records.timestamps_ms.tolist(), records.keys.to_list())
    return list(zip(*columns, records.values.to_list(), headers, strict=True))


def plain_batch(codec: Codec) -> bytes:
    return encode_batch(records_of(PLAIN), base_offset=1000, epoch=7, codec=codec)


def edges_batch(codec: Codec) -> bytes:
    return encode_batch(records_of(EDGES), epoch=1 << 40, codec=codec, producer=ProducerStamp(77, 3, 1 << 33))


def wal_file(ahead_bytes: int = 0) -> bytes:
    """With space ahead the second frame continues the group, and zeros follow."""
    parts = [encode_wal_file_header(TOPIC, 42, previous_size_bytes=123_456, ahead_bytes=ahead_bytes)]
    for batch, partition in ((plain_batch(Codec.NONE), 3), (edges_batch(Codec.NONE), 4_000_000_000)):
        header = read_batch_header(batch)
        place = (TOPIC, partition, header.epoch, header.base_offset, header.record_count)
        continues = ahead_bytes > 0 and len(parts) > 1
        parts += [encode_frame_header(*place, batch, continues=continues), batch]
    return b"".join(parts) + bytes(ahead_bytes // 8)


def segment_file() -> bytes:
    builder = SegmentBuilder(TOPIC, 3, 1 << 40, block_bytes_target=1200, codec=Codec.NONE)
    for at in range(0, 20, 5):
        builder.add(encode_batch(records_of(PLAIN[at : at + 5]), base_offset=1000 + at, epoch=7, codec=Codec.NONE))
    last = (INT64_MAX - 1, *EDGES[3][1:])
    builder.add(encode_batch(records_of([last]), base_offset=INT64_MAX - 1, epoch=1 << 40, codec=Codec.NONE))
    return b"".join(builder.finish().parts)


FILES = {
    "batch_v1_plain_none.bin": lambda: plain_batch(Codec.NONE),
    "batch_v1_plain_lz4.bin": lambda: plain_batch(Codec.LZ4),
    "batch_v1_edges_none.bin": lambda: edges_batch(Codec.NONE),
    "batch_v1_edges_lz4.bin": lambda: edges_batch(Codec.LZ4),
    "batch_v1_plain_zstd.bin": lambda: plain_batch(Codec.ZSTD),
    "batch_v1_edges_zstd.bin": lambda: edges_batch(Codec.ZSTD),
    "batch_v1_plain_gzip.bin": lambda: plain_batch(Codec.GZIP),
    "batch_v1_edges_gzip.bin": lambda: edges_batch(Codec.GZIP),
    "wal_v2.bin": wal_file,
    "wal_v3.bin": lambda: wal_file(ahead_bytes=8192),
    "segment_v1.bin": segment_file,
}
# By other programs than the reader's own.
EXPAND: dict[str, Callable[[bytes, int], bytes]] = {
    "lz4": lambda stored, size_bytes: bytes(lz4.block.decompress(stored, uncompressed_size=size_bytes)),
    "zstd": lambda stored, _: zstandard.ZstdDecompressor().stream_reader(stored).read(),
    "gzip": lambda stored, _: gzip.decompress(stored),
}
COMPRESSED = set(EXPAND)
READ_ONLY = {"wal_v1.bin"}
"""Of versions that are not written any more."""


def golden(name: str) -> bytes:
    return (GOLDEN / name).read_bytes()


def test_the_folder_holds_these_files_and_no_others() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == set(FILES) | READ_ONLY


@pytest.mark.parametrize("name", [name for name in FILES if not COMPRESSED & set(re.split(r"[_.]", name))])
def test_what_is_written_today_is_the_golden_file(name: str) -> None:
    assert FILES[name]() == golden(name)


@pytest.mark.parametrize("name", ["batch_v1_plain", "batch_v1_edges"])
@pytest.mark.parametrize("codec", EXPAND)
def test_compressed_batches_hold_the_payload_of_the_plain_ones(name: str, codec: str) -> None:
    for batch in (golden(f"{name}_{codec}.bin"), FILES[f"{name}_{codec}.bin"]()):
        header = validate_batch(batch)
        assert header.codec is Codec[codec.upper()]
        payload = EXPAND[codec](batch[BATCH_HEADER_SIZE:], header.uncompressed_bytes)
        assert payload == golden(f"{name}_none.bin")[BATCH_HEADER_SIZE:]


@pytest.mark.parametrize("codec", ["none", *EXPAND])
def test_golden_batches_decode(codec: str) -> None:
    plain, edges = golden(f"batch_v1_plain_{codec}.bin"), golden(f"batch_v1_edges_{codec}.bin")
    assert rows_of(decode_batch(plain)) == PLAIN
    assert rows_of(decode_batch(edges)) == EDGES
    header = validate_batch(edges)
    assert (header.epoch, header.producer) == (1 << 40, ProducerStamp(77, 3, 1 << 33))
    assert (header.first_timestamp_ms, header.max_timestamp_ms) == (INT64_MIN, INT64_MAX)


@pytest.mark.parametrize(
    ("version", "previous_size_bytes", "ahead_bytes"), [(1, 0, 0), (2, 123_456, 0), (3, 123_456, 8192)]
)
def test_golden_wal_file_decodes(version: int, previous_size_bytes: int, ahead_bytes: int) -> None:
    data = golden(f"wal_v{version}.bin")
    header = decode_wal_file_header(data)
    assert header == WalFileHeader(
        wal_id=TOPIC, sequence=42, previous_size_bytes=previous_size_bytes, version=version, ahead_bytes=ahead_bytes
    )
    frames = list(scan_frames(data))
    if ahead_bytes:
        assert frames.pop() == SpaceAhead(len(data) - 1024, 1024)
    assert all(isinstance(frame, WalFrame) for frame in frames)
    assert [frame.continues for frame in frames] == [False, ahead_bytes > 0]  # type: ignore[union-attr]
    rows = [rows_of(decode_batch(data[f.batch_at : f.at + f.size_bytes])) for f in frames]  # type: ignore[union-attr]
    assert rows == [PLAIN, EDGES]


def test_golden_segment_decodes() -> None:
    data = golden("segment_v1.bin")

    def read(at: int, size_bytes: int) -> bytes:
        return data[at : at + size_bytes]

    header, index = run_plan(open_segment(len(data)), read)
    assert (header.topic_id, header.partition, header.epoch) == (TOPIC, 3, 1 << 40)
    rows = [row for entry in index for row in rows_of(decode_batch(run_plan(read_block(entry), read)))]
    assert rows == [*PLAIN, (INT64_MAX - 1, *EDGES[3][1:])]
    assert [entry.epoch for entry in index] == [7, 1 << 40]


if __name__ == "__main__":
    for file_name, make in FILES.items():
        path = GOLDEN / file_name
        if not path.exists():
            sys.stdout.write(f"{path}: {path.write_bytes(make())} bytes\n")
