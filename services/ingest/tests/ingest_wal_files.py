"""Frames, replays and broken disks for the tests of the write-ahead log."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from shformat import ProducerStamp, Records, encode_batch, stamp_batch
from shproto.keys import RangeKey
from streamhouse_ingest.adapters.wal_directory import WalDirectory
from streamhouse_ingest.adapters.wal_replay import Replayed, replay_directory
from streamhouse_ingest.log.buffer import WalPosition
from streamhouse_ingest.ports import Frame

KEY = RangeKey(b"t" * 16, 0, 1)
OTHER = RangeKey(b"t" * 16, 1, 1)


def frame(base: int, *values: bytes, key: RangeKey = KEY, producer: ProducerStamp | None = None) -> Frame:
    batch = encode_batch(Records.from_lists(list(values)), producer=producer)
    return Frame(key=key, base_offset=base, record_count=len(values), batch=stamp_batch(batch, base, key.epoch))


def replay(directory: WalDirectory) -> Replayed:
    return replay_directory(directory, 1 << 20)


def spans(found: Replayed, key: RangeKey = KEY) -> list[tuple[int, int]]:
    log = found.replay.logs.get(key)
    return [] if log is None else [(b.base_offset, b.end_offset) for b in log.buffers]


def positions_of(found: Replayed, key: RangeKey = KEY) -> list[WalPosition]:
    return [p for b in found.replay.logs[key].buffers for p, _ in b.pick(b.base_offset, b.end_offset, 1 << 30)]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)


@contextmanager
def unreadable(monkeypatch: pytest.MonkeyPatch, path: Path, start: int, end: int) -> Iterator[None]:
    """A bad spot of the disk: reading any byte of it fails."""
    pread = os.pread

    def read(fd: int, size_bytes: int, at: int) -> bytes:
        if Path(f"/proc/self/fd/{fd}").readlink() == path and at < end and at + size_bytes > start:
            raise OSError(errno.EIO, "Input/output error")
        return pread(fd, size_bytes, at)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pread", read)
        yield
