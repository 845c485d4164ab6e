"""Describes segment objects and write-ahead logs as dictionaries: reading, no printing."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from streamhouse_cli.failures import CliError

Read = Callable[[int, int], bytes]
WAL_PATTERN = "*.wal"


def describe_object(read: Read, size_bytes: int) -> list[dict[str, Any]]:
    """Returns descriptions of all segments of an object, in the order of their bytes; segments lie end to end.

    Each description is shformat's, with `object_at`, the byte at which the segment starts in the object; positions in
    a description count from there.
    """
    from shformat import describe_segment

    described = []
    for at, end in reversed(list(segment_spans(read, size_bytes))):
        described.append({"object_at": at, **describe_segment(_within(read, at), end - at)})
    return described


def segment_spans(read: Read, size_bytes: int) -> Iterator[tuple[int, int]]:
    """Yields (start, end) of the segments of an object, the last segment first: each footer has the size of its
    segment. Everything before a damaged footer is a single span."""
    end = size_bytes
    while end > 0:
        start = _segment_start(read, end)
        yield start, end
        end = start


def _segment_start(read: Read, end: int) -> int:
    from shformat import SEGMENT_FOOTER_SIZE, FormatError
    from shformat.segment import decode_footer

    if end < SEGMENT_FOOTER_SIZE:
        return 0
    footer_bytes = read(end - SEGMENT_FOOTER_SIZE, SEGMENT_FOOTER_SIZE)
    index_at = int.from_bytes(footer_bytes[:8], "little")
    index_size_bytes = int.from_bytes(footer_bytes[8:12], "little")
    size_bytes = index_at + index_size_bytes + SEGMENT_FOOTER_SIZE
    if size_bytes > end:
        return 0
    try:
        decode_footer(footer_bytes, size_bytes)
    except FormatError:
        return 0
    return end - size_bytes


def _within(read: Read, start: int) -> Read:
    return lambda at, size_bytes: read(start + at, size_bytes)


def describe_segment_file(path: Path) -> dict[str, Any]:
    """Returns the described segments of a file on disk. Raises OSError."""
    with path.open("rb") as file:
        size_bytes = path.stat().st_size

        def read(at: int, count: int) -> bytes:
            file.seek(at)
            return file.read(count)

        return {"source": str(path), "size_bytes": size_bytes, "segments": describe_object(read, size_bytes)}


async def describe_segment_object(key: str, store: Any) -> dict[str, Any]:
    """Returns the described segments of an object, fetched piece by piece. Raises StoreError."""
    import asyncio

    info = await store.head(key)
    loop = asyncio.get_running_loop()

    def read(at: int, count: int) -> bytes:
        body: bytes = asyncio.run_coroutine_threadsafe(store.get(key, at=at, size_bytes=count), loop).result()
        return body

    segments = await asyncio.to_thread(describe_object, read, info.size_bytes)
    return {"source": key, "size_bytes": info.size_bytes, "segments": segments}


def describe_wal(path: Path) -> dict[str, Any]:
    """Returns the described files of a write-ahead log directory in order, or of a single file. Raises OSError,
    CliError."""
    from shformat import describe_wal_file

    files = sorted(path.glob(WAL_PATTERN)) if path.is_dir() else [path]
    if not files:
        raise CliError(f"{path} holds no {WAL_PATTERN} file: it is no write-ahead log, or an empty one")
    described = []
    for file in files:
        with _mapped(file) as buffer:
            described.append({"file": str(file), **describe_wal_file(buffer)})
    for file_before, file_after in pairwise(described):
        _note_cut_short(file_before, file_after)
    return {"source": str(path), "size_bytes": sum(item["size_bytes"] for item in described), "files": described}


def _note_cut_short(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Notes damage that no frame shows: a file cut off between two frames, or with zeros in place of frames, is shorter
    than the header of the next file says."""
    at = before["size_bytes"] - before["space_ahead_bytes"]
    declared = after["header"]["previous_size_bytes"] if after["header"] else 0
    follows = before["header"] and after["header"] and before["header"]["sequence"] + 1 == after["header"]["sequence"]
    if follows and at < declared:
        ends = "only zeros follow" if before["space_ahead_bytes"] else "the file ends here"
        what = f"{ends}, the next one says that {declared} bytes were written"
        before["damage"].append({"at": at, "size_bytes": declared - at, "what": what, "lost": None})


@contextmanager
def _mapped(path: Path) -> Iterator[Any]:
    """Yields the bytes of a file, paged in when they are read; an empty file cannot be mapped."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            yield b""
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            yield buffer
