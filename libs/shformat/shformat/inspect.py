"""Segments and WAL files as plain dictionaries (JSON-ready), damage included, for the `inspect` commands.

Reads and checks everything; never raises on content.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

from .batch import check_batch, validate_batch
from .batch_header import BatchHeader, Buffer
from .errors import FormatError
from .limits import DEFAULT_LIMITS, FormatLimits
from .segment import (
    SEGMENT_BYTES_MIN,
    SEGMENT_FOOTER_SIZE,
    SEGMENT_HEADER_SIZE,
    SegmentHeader,
    check_agreement,
    decode_footer,
    decode_index,
    decode_segment_header,
)
from .segment_index import BlockEntry, SegmentIndex
from .segment_reader import read_block, run_plan
from .wal import WAL_FILE_HEADER_SIZE, SpaceAhead, WalFrame, decode_wal_file_header, frames_start, scan_frames

Description = dict[str, Any]
T = TypeVar("T")
Read = Callable[[int, int], Buffer]


def describe_segment(read: Read, size_bytes: int, limits: FormatLimits = DEFAULT_LIMITS) -> Description:
    """Returns header, every block and all damage of the segment behind `read(at, size_bytes)`.

    Keys: size_bytes, header (None if damaged), blocks, footer_at, index_intact, raw_bytes, compression_ratio, damage (a
    list of {at, what}, empty for a sound segment). Without an intact index the blocks are found by walking from the
    header on. Errors of `read` pass through.
    """
    damage: list[Description] = []
    header = _attempt(lambda: decode_segment_header(read(0, min(size_bytes, SEGMENT_HEADER_SIZE))), damage)
    index = _attempt(lambda: _read_index(read, size_bytes, limits), damage)
    if header is not None and index is not None:
        _attempt(lambda: check_agreement(header, index), damage)
    if index is None:
        blocks = _walk_blocks(read, size_bytes, damage, limits)
    else:
        blocks = [_describe_block(read, entry, damage, limits) for entry in index]
    raw_bytes = sum(block["uncompressed_bytes"] for block in blocks)
    return {
        "kind": "segment",
        "size_bytes": size_bytes,
        "header": None if header is None else _describe_header(header),
        "blocks": blocks,
        "footer_at": size_bytes - SEGMENT_FOOTER_SIZE,
        "index_intact": index is not None,
        "raw_bytes": raw_bytes,
        "compression_ratio": round(raw_bytes / size_bytes, 3) if size_bytes else 0.0,
        "damage": damage,
    }


def describe_wal_file(buffer: Buffer, limits: FormatLimits = DEFAULT_LIMITS) -> Description:
    """Returns header, every frame and all damage of a WAL file.

    Keys: size_bytes, header (None if damaged), frames, record_count, space_ahead_bytes (zeros at the end without a
    frame yet), damage ({at, size_bytes, what, lost}; `lost` names partition and offsets if the damaged frame's own
    header is intact), ends_in_damage (a torn tail, or damage that reaches the end of the written bytes: only the
    writer's history can tell).
    """
    damage: list[Description] = []
    header = _attempt(lambda: decode_wal_file_header(buffer), damage)
    for entry in damage:
        entry |= {"size_bytes": min(len(buffer), frames_start(buffer, limits)), "lost": None}
    frames = []
    end_of_damage = 0
    written_bytes = len(buffer)
    view = memoryview(buffer)
    for item in scan_frames(view, limits=limits):
        if isinstance(item, WalFrame):
            frames.append(_describe_frame(item, view, damage, limits))
            continue
        if isinstance(item, SpaceAhead):
            written_bytes = item.at
            continue
        lost = None if item.lost is None else _describe_place(item.lost)
        damage.append({"at": item.at, "what": item.reason, "size_bytes": item.size_bytes, "lost": lost})
        end_of_damage = item.at + item.size_bytes
    header_cut = header is None and len(buffer) < WAL_FILE_HEADER_SIZE
    return {
        "kind": "wal",
        "size_bytes": len(buffer),
        "header": header and {**asdict(header), "wal_id": header.wal_id.hex()},
        "frames": frames,
        "record_count": sum(frame["record_count"] for frame in frames),
        "space_ahead_bytes": len(buffer) - written_bytes,
        "damage": damage,
        "ends_in_damage": header_cut or end_of_damage == written_bytes,
    }


# ---- segments


def _describe_header(header: SegmentHeader) -> Description:
    return {
        **asdict(header),
        "topic_id": str(uuid.UUID(bytes=header.topic_id)),
        "codec": header.codec.name.lower(),
    }


def _read_index(read: Read, size_bytes: int, limits: FormatLimits) -> SegmentIndex:
    if not SEGMENT_BYTES_MIN <= size_bytes <= limits.segment_bytes_max:
        low, high = SEGMENT_BYTES_MIN, limits.segment_bytes_max
        raise FormatError(f"segment of {size_bytes} bytes, must be {low} to {high} (segment_bytes_max)")
    end = read(size_bytes - SEGMENT_FOOTER_SIZE, SEGMENT_FOOTER_SIZE)
    footer = decode_footer(end, size_bytes, limits)
    return decode_index(read(footer.index_at, footer.index_size_bytes), footer, limits)


def _describe_block(read: Read, entry: BlockEntry, damage: list[Description], limits: FormatLimits) -> Description:
    described: Description = {**asdict(entry), "crc": f"{entry.crc:#010x}", "intact": False}
    block = _attempt(lambda: run_plan(read_block(entry, limits), read), damage)
    batch = None if block is None else _attempt(lambda: validate_batch(block, limits), damage, entry.at)
    if batch is not None:
        described |= {"codec": batch.codec.name.lower(), "intact": True}
    return described


def _walk_blocks(read: Read, size_bytes: int, damage: list[Description], limits: FormatLimits) -> list[Description]:
    """Returns the blocks from the header on; stops at the first block without a readable size."""
    blocks = []
    at = SEGMENT_HEADER_SIZE
    while at < size_bytes:
        piece = read(at, min(size_bytes - at, limits.batch_bytes_max))
        try:
            batch = check_batch(piece, 0, limits)
        except FormatError as error:
            damage.append({"at": at + error.at, "what": f"no block, or the end of the blocks: {error.what}"})
            break
        blocks.append({**_describe_batch(batch), "at": at, "intact": True})
        at += batch.size_bytes
    return blocks


def _describe_batch(batch: BatchHeader) -> Description:
    return {
        "first_offset": batch.base_offset,
        "end_offset": batch.end_offset,
        "epoch": batch.epoch,
        "codec": batch.codec.name.lower(),
        "size_bytes": batch.size_bytes,
        "uncompressed_bytes": batch.uncompressed_bytes,
        "record_count": batch.record_count,
        "first_timestamp_ms": batch.first_timestamp_ms,
        "max_timestamp_ms": batch.max_timestamp_ms,
    }


# ---- WAL files


def _describe_frame(frame: WalFrame, view: memoryview, damage: list[Description], limits: FormatLimits) -> Description:
    """Returns the frame's description; a batch inside that contradicts the frame is added to `damage`."""
    described = {**_describe_place(frame), "at": frame.at, "size_bytes": frame.size_bytes, "intact": True}
    fault: FormatError | None = None
    try:
        batch = validate_batch(view[frame.batch_at : frame.at + frame.size_bytes], limits)
        described["batch"] = _describe_batch(batch)
        if (batch.base_offset, batch.epoch, batch.record_count) != (
            frame.base_offset,
            frame.epoch,
            frame.record_count,
        ):
            fault = FormatError("batch and frame differ in base offset, epoch or record count")
    except FormatError as error:
        fault = error
    if fault is not None:
        described["intact"] = False
        entry = {"at": frame.batch_at + fault.at, "what": fault.what, "size_bytes": frame.batch_size_bytes}
        damage.append({**entry, "lost": _describe_place(frame)})
    return described


def _describe_place(frame: WalFrame) -> Description:
    return {
        "topic_id": str(uuid.UUID(bytes=frame.topic_id)),
        "partition": frame.partition,
        "epoch": frame.epoch,
        "base_offset": frame.base_offset,
        "record_count": frame.record_count,
    }


def _attempt(step: Callable[[], T], damage: list[Description], at: int = 0) -> T | None:
    """Returns the step's result, or adds an entry to `damage` and returns None if it meets bad bytes."""
    try:
        return step()
    except FormatError as error:
        damage.append({"at": at + error.at, "what": error.what})
        return None
