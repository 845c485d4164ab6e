"""The format pages: their field tables and worked examples are what the code does."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from shformat import (
    BATCH_HEADER_SIZE,
    DEFAULT_LIMITS,
    FRAME_HEADER_SIZE,
    SEGMENT_FOOTER_SIZE,
    SEGMENT_HEADER_SIZE,
    WAL_FILE_HEADER_SIZE,
    Codec,
    FormatLimits,
    Records,
    SegmentBuilder,
    describe_wal_file,
    encode_batch,
    encode_frame_header,
    encode_wal_file_header,
)
from shformat.batch_header import _HEADER as BATCH_HEADER
from shformat.segment import _FOOTER as SEGMENT_FOOTER
from shformat.segment import _HEADER as SEGMENT_HEADER
from shformat.segment_index import INDEX_ENTRY, INDEX_ENTRY_SIZE
from shformat.wal import _FILE as WAL_FILE_HEADER
from shformat.wal import _FRAME as FRAME_HEADER

pytestmark = pytest.mark.quick

PAGES = Path(__file__).parents[3] / "docs" / "formats"
TOPIC = bytes(range(16, 32))
HEX_LINE = re.compile(r"([0-9a-f]{4})  ((?:[0-9a-f]{2} ?){1,16}?) {2,}\S")


def page(name: str) -> str:
    return (PAGES / f"{name}.md").read_text(encoding="utf-8")


def example_of(name: str) -> bytes:
    """The bytes of a page's worked example; every line states its own position."""
    (block,) = re.findall(r"```hex\n(.*?)```", page(name), re.DOTALL)
    data = b""
    for line in block.splitlines():
        match = HEX_LINE.match(line)
        assert match, line
        assert int(match[1], 16) == len(data), line
        data += bytes.fromhex(match[2])
    return data


def example_batch() -> bytes:
    records = Records.from_lists(
        [b'{"n":1}', None],
        keys=[b"user-1", None],
        timestamps_ms=[1_700_000_000_000, 1_700_000_000_005],
        headers=[[("trace", b"1")], []],
    )
    return encode_batch(records, base_offset=42, epoch=3, codec=Codec.NONE)


def example_wal_file() -> bytes:
    batch = example_batch()
    return encode_wal_file_header(bytes(range(1, 17)), 2, 4096) + encode_frame_header(TOPIC, 2, 3, 42, 2, batch) + batch


def example_segment() -> bytes:
    builder = SegmentBuilder(TOPIC, 2, 3, codec=Codec.NONE)
    builder.add(example_batch())
    return b"".join(builder.finish().parts)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("record-batch", example_batch()), ("wal", example_wal_file()), ("segment", example_segment())],
)
def test_worked_example(name: str, expected: bytes) -> None:
    assert example_of(name).hex(" ") == expected.hex(" ")


def test_the_wal_example_is_a_sound_file() -> None:
    assert describe_wal_file(example_of("wal"))["damage"] == []


# The struct code of a field of this type and size.
CODES = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q", "i64": "q"}


def table_of(name: str, section: str) -> list[tuple[int, int, str]]:
    """(at, size, type) of each row of the field table under a heading."""
    text = page(name).split(f"\n## {section}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\w+) \| ", text, re.MULTILINE)
    return [(int(at), int(size), kind) for at, size, kind in rows]


@pytest.mark.parametrize(
    ("name", "section", "form", "size"),
    [
        ("record-batch", "Header", BATCH_HEADER.format, BATCH_HEADER_SIZE),
        ("wal", "File header", WAL_FILE_HEADER.format, WAL_FILE_HEADER_SIZE),
        ("wal", "Frame header", FRAME_HEADER.format, FRAME_HEADER_SIZE),
        ("segment", "Header", SEGMENT_HEADER.format, SEGMENT_HEADER_SIZE),
        ("segment", "Footer", SEGMENT_FOOTER.format, SEGMENT_FOOTER_SIZE),
    ],
)
def test_field_table_is_the_struct(name: str, section: str, form: str, size: int) -> None:
    rows = table_of(name, section)
    at = 0
    codes = "<"
    for row_at, row_size, kind in rows:
        assert row_at == at
        codes += f"{row_size}s" if kind == "bytes" else CODES[kind]
        at += row_size
    assert at == size
    assert codes == form


def test_index_table_is_the_array_type() -> None:
    rows = table_of("segment", "Index")
    assert INDEX_ENTRY.fields is not None
    found = [(at, dtype.itemsize, f"{dtype.kind}{dtype.itemsize * 8}") for dtype, at, *_ in INDEX_ENTRY.fields.values()]
    assert rows == found
    assert sum(size for _, size, _ in rows) == INDEX_ENTRY_SIZE


def test_every_limit_is_named_on_a_page_with_its_default() -> None:
    text = page("record-batch") + page("wal") + page("segment")
    for field in fields(FormatLimits):
        value = getattr(DEFAULT_LIMITS, field.name)
        shown = {1 << 30: "1 GiB", 16 << 20: "16 MiB", 64 << 20: "64 MiB"}.get(value, f"{value:,}")
        assert re.search(rf"`{field.name}`[ ,(]+{shown}", text), field.name
