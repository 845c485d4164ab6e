"""Small groups over zeros that were written ahead: what is on the disk, and what replays make of every crash.

Quotes guarantees G1 (nothing acknowledged is lost), G2 (no offset is used twice) and G6 (no silent damage): a killed
process leaves no doubt, a power cut leaves no damage, and damage stays damage.
"""

import errno
import json
import os
import random
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shformat import (
    FRAME_HEADER_SIZE,
    WAL_FILE_HEADER_SIZE,
    Codec,
    Records,
    decode_wal_file_header,
    encode_batch,
    encode_wal_file_header,
    stamp_batch,
)
from shproto.keys import RangeKey
from shruntime import files
from streamhouse_ingest.adapters import wal as wal_module
from streamhouse_ingest.adapters.wal import FileBatchReader, FileWal
from streamhouse_ingest.adapters.wal_directory import WalDirectory
from streamhouse_ingest.adapters.wal_replay import Replayed
from streamhouse_ingest.ports import Frame, WalBroken, WalFull, WrongIdentity

from services.ingest.tests.ingest_wal_files import (
    KEY,
    OTHER,
    flip,
    frame,
    positions_of,
    replay,
    spans,
    unreadable,
)
from tests.platform.disk import full_disk

AHEAD = 8192
SECTOR = 512


def new_wal(directory: WalDirectory, next_sequence: int = 1, *, file_bytes: int = 1 << 20, before: int = 0) -> FileWal:
    """`before`: size of the file before."""
    limits = {"file_bytes": file_bytes, "previous_size_bytes": before, "ahead_bytes": AHEAD}
    return FileWal(directory, next_sequence, fsync_each=True, **limits)


def plain(base: int, value: bytes, key: RangeKey = KEY) -> Frame:
    """A frame of one record that is stored as it is: zeros stay zeros."""
    batch = encode_batch(Records.from_lists([value]), codec=Codec.NONE)
    return Frame(key=key, base_offset=base, record_count=1, batch=stamp_batch(batch, base, key.epoch))


def killed(directory: WalDirectory, *groups: Sequence[Frame]) -> tuple[Path, list[int]]:
    """The file of a process that wrote these groups and was killed; where each of them ends."""
    wal = new_wal(directory)
    ends = [positions[-1].at + positions[-1].size_bytes for positions in map(wal.append, groups)]
    assert directory.file_path(1).stat().st_size > wal.active_bytes == ends[-1]
    return directory.file_path(1), ends


# ---- writing


def test_small_groups_change_the_files_size_once_in_a_while(directory: WalDirectory) -> None:
    wal = new_wal(directory)
    path = directory.file_path(1)
    sizes = []
    for base in range(60):
        wal.append([plain(base, os.urandom(200))])
        sizes.append(path.stat().st_size)
        assert wal.active_bytes <= sizes[-1] <= wal.active_bytes + AHEAD
    assert len(set(sizes)) <= 60 * 350 // (AHEAD - AHEAD // 4) + 1
    header = decode_wal_file_header(path.read_bytes())
    assert (header.version, header.ahead_bytes) == (3, AHEAD)
    wal.close()
    assert path.stat().st_size == wal.active_bytes
    assert spans(replay(directory)) == [(0, 60)]


def test_large_groups_are_appended_over_and_beyond_the_space_ahead(directory: WalDirectory) -> None:
    wal = new_wal(directory)
    path = directory.file_path(1)
    wal.append([plain(0, b"a")])
    wal.append([plain(1, os.urandom(2 * AHEAD))])
    assert path.stat().st_size == wal.active_bytes, "no zeros for a group that waits for bandwidth"
    wal.append([plain(2, os.urandom(AHEAD // 2))])
    assert path.stat().st_size == wal.active_bytes
    wal.append([plain(3, b"b")])
    assert path.stat().st_size > wal.active_bytes
    wal.close()
    assert spans(replay(directory)) == [(0, 4)]


def test_space_ahead_ends_with_the_file(directory: WalDirectory) -> None:
    wal = new_wal(directory, file_bytes=2 * AHEAD)
    files_of = [wal.append([plain(base, os.urandom(300))])[0].file for base in range(80)]
    assert len(set(files_of)) > 1
    for sequence in set(files_of):
        assert directory.file_path(sequence).stat().st_size <= 2 * AHEAD
    wal.close()
    assert spans(replay(directory)) == [(0, 80)]


def test_g6_a_file_is_cut_back_and_synced_before_the_next_one_is_begun(
    directory: WalDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    wal = new_wal(directory, file_bytes=4000)
    done: list[tuple[str, int, bool]] = []

    def noted(name: str) -> Callable[..., None]:
        call = getattr(os, name)

        def run(fd: int, *arguments: int) -> None:
            call(fd, *arguments)
            done.append((name, os.fstat(fd).st_size, directory.file_path(2).exists()))

        return run

    wal.append([plain(0, os.urandom(1000))])
    good = wal.active_bytes
    for name in ("ftruncate", "fsync"):
        monkeypatch.setattr(os, name, noted(name))
    wal.append([plain(1, os.urandom(3000))])
    assert done[:2] == [("ftruncate", good, False), ("fsync", good, False)]
    header = decode_wal_file_header(directory.file_path(2).read_bytes())
    assert header.previous_size_bytes == good
    monkeypatch.undo()
    wal.close()


def test_without_space_ahead_files_are_of_version_2_and_as_they_were(directory: WalDirectory) -> None:
    wal = FileWal(directory, 1, file_bytes=1 << 20, fsync_each=True)
    wal.append([plain(0, b"a"), plain(1, b"b")])
    path = directory.file_path(1)
    assert path.stat().st_size == wal.active_bytes
    assert decode_wal_file_header(path.read_bytes()).version == 2
    assert json.loads((directory.path / "identity").read_text())["version"] == 1
    wal.close()


def test_older_versions_refuse_a_directory_with_files_of_version_3(tmp_path: Path) -> None:
    """They look at the version of the identity file; they would take frames that continue a group for damage."""
    directory = WalDirectory.open(tmp_path / "wal", "agent-1")
    before = json.loads((directory.path / "identity").read_text())
    wal = new_wal(directory)
    wal.append([plain(0, b"a")])
    wal.close()
    directory.close()
    identity = directory.path / "identity"
    assert json.loads(identity.read_text()) == before | {"version": 2}
    again = WalDirectory.open(tmp_path / "wal", "agent-1")
    assert again.wal_id.hex() == before["wal_id"]
    again.close()
    identity.write_text(json.dumps(before | {"version": 3}))
    with pytest.raises(WrongIdentity, match="version 3"):
        WalDirectory.open(tmp_path / "wal", "agent-1")


# ---- disks that are full or broken


def test_a_disk_without_room_for_zeros_takes_the_group_all_the_same(directory: WalDirectory) -> None:
    wal = new_wal(directory)
    wal.append([plain(0, os.urandom(AHEAD))])
    path = directory.file_path(1)
    with full_disk(wal.active_bytes + 2000):
        wal.append([plain(1, os.urandom(500))])
        assert path.stat().st_size == wal.active_bytes
        wal.append([plain(2, os.urandom(500))])
        with pytest.raises(WalFull):
            wal.append([plain(3, os.urandom(1500))])
        assert path.stat().st_size == wal.active_bytes
    wal.append([plain(3, os.urandom(500))])
    found = replay(directory)
    assert (spans(found), found.replay.damage, bool(found.replay.gaps)) == ([(0, 4)], [], False)
    wal.close()


def test_what_a_full_disk_took_of_a_group_is_gone_from_the_space_ahead(directory: WalDirectory) -> None:
    """Whole frames of it lay over the zeros."""
    wal = new_wal(directory)
    wal.append([plain(0, b"a")])
    path = directory.file_path(1)
    with full_disk(path.stat().st_size), pytest.raises(WalFull):
        wal.append([plain(1 + i, os.urandom(1000)) for i in range(10)])
    assert path.stat().st_size == wal.active_bytes
    wal.append([plain(1, b"b")])
    data = path.read_bytes()
    assert not data[wal.active_bytes :].strip(b"\0")
    found = replay(directory)
    assert (spans(found), found.replay.damage, bool(found.replay.gaps)) == ([(0, 2)], [], False)
    wal.close()


@pytest.mark.parametrize("failing", ["pwrite", "fdatasync"])
def test_an_io_error_while_the_space_ahead_is_written_breaks_the_log(
    directory: WalDirectory, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    wal = new_wal(directory)
    wal.append([plain(0, os.urandom(AHEAD))])
    call = getattr(wal_module.os, failing)

    def fail(fd: int, *arguments: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pwritev" if failing == "pwrite" else failing, fail)
    with pytest.raises(WalBroken):
        wal.append([plain(1, b"a")])
    monkeypatch.undo()
    assert wal.broken
    wal.close()
    assert call is getattr(os, failing)
    assert spans(replay(directory))[0][0] == 0


def test_a_broken_log_is_left_as_it_is_when_it_is_closed(
    directory: WalDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    wal = new_wal(directory)
    wal.append([plain(0, b"a")])

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(WalBroken):
        wal.append([plain(1, b"b")])
    monkeypatch.undo()
    size_bytes = directory.file_path(1).stat().st_size
    wal.close()
    assert directory.file_path(1).stat().st_size == size_bytes


def test_g1_a_group_whose_fsync_failed_leaves_no_doubt_when_the_disk_never_got_it(directory: WalDirectory) -> None:
    """The page cache lets go of it: zeros again, of a group that was not acknowledged."""
    path, _ = killed(directory, [plain(0, b"a")])
    found = replay(directory)
    assert (spans(found), bool(found.replay.gaps)) == ([(0, 1)], False)
    assert path.stat().st_size == found.previous_size_bytes


# ---- the end of the last file


def test_a_killed_process_leaves_a_clean_end(directory: WalDirectory) -> None:
    path, ends = killed(directory, [frame(0, b"a"), frame(0, b"x", key=OTHER)], [frame(1, b"b")])
    found = replay(directory)
    assert (spans(found), spans(found, OTHER), found.replay.damage) == ([(0, 2)], [(0, 1)], [])
    assert not found.replay.gaps
    assert path.stat().st_size == ends[-1] == found.previous_size_bytes == found.index.size_bytes


def test_a_file_with_zeros_and_no_frame_is_removed(directory: WalDirectory) -> None:
    path = directory.file_path(1)
    path.write_bytes(encode_wal_file_header(directory.wal_id, 1, 0, AHEAD) + bytes(AHEAD))
    found = replay(directory)
    assert (directory.sequences(), found.next_sequence, bool(found.replay.gaps)) == ([], 1, False)


@pytest.mark.parametrize("kept", [1, 57, 700])
def test_a_group_without_its_first_byte_was_never_finished(directory: WalDirectory, kept: int) -> None:
    """Any part of it may be there, whole frames too."""
    group = [plain(1, os.urandom(300)), plain(2, os.urandom(300)), plain(0, os.urandom(300), OTHER)]
    path, ends = killed(directory, [plain(0, b"a")], group)
    data = bytearray(path.read_bytes())
    data[ends[0]] = 0
    for end in (ends[0] + kept, ends[1]):
        path.write_bytes(data[:end] + bytes(len(data) - end))
        found = replay(directory)
        assert (spans(found), found.replay.damage, bool(found.replay.gaps)) == ([(0, 1)], [], False)
        assert path.stat().st_size == ends[0]


def test_g2_a_group_of_which_sectors_are_missing_may_be_damage_and_no_offset_of_it_is_used_again(
    directory: WalDirectory,
) -> None:
    group = [plain(1, os.urandom(500)), plain(2, os.urandom(500)), plain(0, os.urandom(500), OTHER)]
    path, ends = killed(directory, [plain(0, os.urandom(500))], group)
    whole = path.read_bytes()
    second = ends[0] + len(group[0].batch) + FRAME_HEADER_SIZE
    third = second + len(group[1].batch) + FRAME_HEADER_SIZE
    for sector in range(-(-ends[0] // SECTOR), -(-ends[1] // SECTOR)):
        data = bytearray(whole)
        data[sector * SECTOR : (sector + 1) * SECTOR] = bytes(SECTOR)
        path.write_bytes(data)
        for _ in range(2):
            found = replay(directory)
            gaps = found.replay.gaps
            assert (found.replay.damage, gaps.torn_tail, gaps.corrupt_frames) == ([], True, False)
            assert spans(found) == [(0, 1 + sum(sector * SECTOR >= end for end in (second, third)))]
            assert spans(found, OTHER) == [], "what a part is missing of was not acknowledged"


def test_frames_behind_a_torn_one_are_not_found_by_a_later_start(directory: WalDirectory) -> None:
    """Their producers have sent them again since: G5 would be broken by a second copy."""
    group = [plain(1, os.urandom(1200)), plain(2, os.urandom(300))]
    path, ends = killed(directory, [plain(0, os.urandom(500))], group)
    data = bytearray(path.read_bytes())
    lost = (ends[0] // SECTOR + 2) * SECTOR
    data[lost : lost + SECTOR] = bytes(SECTOR)
    path.write_bytes(data)
    found = replay(directory)
    assert (spans(found), found.replay.gaps.torn_tail) == ([(0, 1)], True)
    wal = new_wal(directory, found.next_sequence, before=found.previous_size_bytes)
    wal.mark_settled()
    wal.append([plain(1000, b"again", RangeKey(*KEY.partition_key, 2))])
    wal.close()
    again = replay(directory)
    assert (spans(again), bool(again.replay.gaps)) == ([(0, 1)], False)
    assert spans(again, RangeKey(*KEY.partition_key, 2)) == [(1000, 1001)]


@pytest.mark.parametrize("cleared", [True, False])
def test_zeros_longer_than_the_space_ahead_may_be_damage(directory: WalDirectory, cleared: bool) -> None:
    path, ends = killed(directory, [plain(0, b"a")])
    zeros = bytes(AHEAD + (0 if cleared else 1))
    path.write_bytes(path.read_bytes()[: ends[0]] + zeros)
    found = replay(directory)
    assert (spans(found), found.replay.damage) == ([(0, 1)], [])
    assert found.replay.gaps.torn_tail is not cleared


def test_zeros_at_the_end_of_a_version_2_file_stay_a_torn_write(directory: WalDirectory) -> None:
    wal = FileWal(directory, 1, file_bytes=1 << 20, fsync_each=True)
    wal.append([plain(0, b"a")])
    wal.close()
    with directory.file_path(1).open("ab") as file:
        file.write(bytes(AHEAD))
    assert replay(directory).replay.gaps.torn_tail


@pytest.mark.long
@pytest.mark.usefixtures("_quick")
def test_g6_a_flipped_bit_of_the_last_group_is_damage_whatever_zeros_follow(directory: WalDirectory) -> None:
    group = [plain(1, os.urandom(50)), plain(2, os.urandom(30) + bytes(20))]
    path, ends = killed(directory, [plain(0, b"a")], group)
    whole = path.read_bytes()
    second = ends[0] + FRAME_HEADER_SIZE + len(group[0].batch)
    for at in range(ends[0], ends[1]):
        path.write_bytes(whole)
        flip(path, at)
        for _ in range(2):
            found = replay(directory)
            assert len(found.replay.damage) == 1, at
            assert spans(found) == ([(0, 2)] if at >= second else [(0, 1), (2, 3)])
            assert found.replay.gaps.torn_tail is False
            in_batch = FRAME_HEADER_SIZE <= at - ends[0] < second - ends[0] or at >= second + FRAME_HEADER_SIZE
            assert found.replay.gaps.corrupt_frames is not in_batch, "the frame's header says what is lost"
            is_known = found.replay.gaps.knows_end(KEY)
            assert is_known == (found.replay.logs[KEY].end_offset == 3), "lost by name, or doubt"


def test_g6_damage_that_is_shorter_than_a_frame_stays_damage_at_every_start(directory: WalDirectory) -> None:
    path, ends = killed(directory, [plain(0, b"a")])
    data = bytearray(path.read_bytes())
    assert ends[0] % SECTOR < SECTOR - FRAME_HEADER_SIZE, "no sector is missing"
    data[ends[0] : ends[0] + 20] = b"\xf5" * 20
    path.write_bytes(data)
    for _ in range(3):
        found = replay(directory)
        assert (spans(found), len(found.replay.damage), found.replay.gaps.corrupt_frames) == ([(0, 1)], 1, True)


def test_g6_damage_before_a_synced_group_is_damage_though_sectors_are_zeros(directory: WalDirectory) -> None:
    """That a later group begins proves that the one before was synced."""
    groups = [[plain(0, b"a")], [plain(1, os.urandom(1500)), plain(2, b"b")], [plain(3, b"c")]]
    path, ends = killed(directory, *groups)
    data = bytearray(path.read_bytes())
    lost = (ends[0] // SECTOR + 2) * SECTOR
    data[lost : lost + SECTOR] = bytes(SECTOR)
    path.write_bytes(data)
    found = replay(directory)
    assert spans(found) == [(0, 1), (2, 4)]
    assert (len(found.replay.damage), found.replay.gaps.torn_tail) == (1, False)


def test_g6_zeros_in_a_file_that_is_not_the_last_are_damage(directory: WalDirectory) -> None:
    """It had been cut back: frames were there."""
    wal = new_wal(directory, file_bytes=2000)
    wal.append([plain(0, os.urandom(1000))])
    wal.append([plain(1, os.urandom(300))])
    wal.append([plain(2, os.urandom(1000))])
    wal.close()
    path = directory.file_path(1)
    data = path.read_bytes()
    end = positions_of(replay(directory))[0].at + len(plain(0, os.urandom(1000)).batch)
    path.write_bytes(data[:end] + bytes(len(data) - end))
    found = replay(directory)
    assert spans(found) == [(0, 1), (2, 3)]
    assert len(found.replay.damage) == 1 and found.replay.gaps.corrupt_frames


def test_a_damaged_file_header_brings_the_cautious_rule_back(directory: WalDirectory) -> None:
    path, _ = killed(directory, [plain(0, b"a"), plain(1, b"b")])
    flip(path, 10)
    found = replay(directory)
    assert spans(found) == [(0, 2)]
    assert found.replay.gaps.torn_tail
    assert [(d.file, d.at) for d in found.replay.damage] == [(1, 0)]


def test_where_the_disk_gives_nothing_back_zeros_prove_nothing(
    directory: WalDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, ends = killed(directory, [plain(i, os.urandom(500)) for i in range(2)])
    size_bytes = path.stat().st_size
    with unreadable(monkeypatch, path, ends[-1] + 4096, size_bytes):
        found = replay(directory)
    assert (spans(found), found.replay.damage, found.replay.gaps.torn_tail) == ([(0, 2)], [], True)
    found = replay(directory)
    assert (spans(found), bool(found.replay.gaps)) == ([(0, 2)], False)


# ---- every crash


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests keep account of what is durable themselves."""
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda fd: None)


class PowerCut(BaseException):
    """The process stops in the middle of a system call."""


@dataclass
class Disk:
    """The module `os` of wal.py, which notes what of each file is durable, what was done since, and ends the process at
    the `cut_at`-th call. `room_bytes`: that files may grow by together."""

    cut_at: int
    room_bytes: int
    calls: int = 0
    paths: dict[int, str] = field(default_factory=dict)
    durable: dict[str, bytes] = field(default_factory=dict)
    since: dict[str, list[tuple[int, bytes | None]]] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _step(self) -> None:
        self.calls += 1
        if self.calls == self.cut_at:
            raise PowerCut

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        fd = os.open(path, flags, mode)
        self.paths[fd] = path.name
        if flags & os.O_CREAT:
            self.durable[path.name], self.since[path.name] = b"", []
        return fd

    def write(self, fd: int, data: bytes) -> int:
        return self.pwrite(fd, data, os.fstat(fd).st_size)

    def pwritev(self, fd: int, parts: Sequence[bytes], at: int) -> int:
        return self.pwrite(fd, b"".join(parts), at)

    def pwrite(self, fd: int, data: bytes | memoryview, at: int) -> int:
        self._step()
        growth = max(0, at + len(data) - os.fstat(fd).st_size)
        written = bytes(data)[: len(data) - max(0, growth - self.room_bytes)]
        if not written:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room_bytes -= min(growth, self.room_bytes)
        self.since[self.paths[fd]].append((at, written))
        return os.pwrite(fd, written, at)

    def ftruncate(self, fd: int, size_bytes: int) -> None:
        self._step()
        self.room_bytes += max(0, os.fstat(fd).st_size - size_bytes)
        self.since[self.paths[fd]].append((size_bytes, None))
        os.ftruncate(fd, size_bytes)

    def fsync(self, fd: int) -> None:
        self._step()
        name = self.paths[fd]
        self.durable[name], self.since[name] = os.pread(fd, 1 << 30, 0), []

    fdatasync = fsync


def after_a_power_cut(durable: bytes, since: Sequence[tuple[int, bytes | None]], rng: random.Random) -> bytes:
    """What is left of a file: its size after some number of calls, and of each sector what it held after some number of
    calls. What a size has brought and no write is zeros."""
    changes_kept = rng.choice((0, len(since), rng.randrange(len(since) + 1)))
    size_bytes, longest = len(durable), len(durable)
    for number, (at, data) in enumerate(since):
        if number < changes_kept:
            size_bytes = at if data is None else max(size_bytes, at + len(data))
        longest = max(longest, at if data is None else at + len(data))
    left = bytearray(longest)
    share = rng.choice((0.1, 0.5, 0.9))
    for start in range(0, longest, SECTOR):
        writes_kept = len(since) if rng.random() < share else rng.randrange(len(since) + 1)
        sector = bytearray(durable[start : start + SECTOR].ljust(SECTOR, b"\0"))
        for number, (at, data) in enumerate(since):
            if data is None and number >= changes_kept:
                break  # what was written afterwards lies in blocks that the file has not
            if data is None:
                kept = min(max(at - start, 0), SECTOR)
                sector[kept:] = bytes(SECTOR - kept)
            elif number < writes_kept and at < start + SECTOR and at + len(data) > start:
                low, high = max(at, start), min(at + len(data), start + SECTOR)
                sector[low - start : high - start] = data[low - at : high - at]
        left[start : start + SECTOR] = sector[: longest - start]
    return bytes(left[:size_bytes]).ljust(size_bytes, b"\0")


def after_a_kill(durable: bytes, since: Sequence[tuple[int, bytes | None]], rng: random.Random) -> bytes:
    """Everything that was done, the last write possibly in part."""
    left = bytearray(durable)
    for number, (at, data) in enumerate(since):
        if data is not None and number == len(since) - 1 and len(data) > 1:
            data = data[: rng.randrange(1, len(data) + 1)]
        if data is None:
            del left[at:]
        else:
            left.extend(bytes(max(0, at + len(data) - len(left))))
            left[at : at + len(data)] = data
    return bytes(left)


Found = dict[tuple[RangeKey, int], bytes]


class Writing:
    """Groups of two logs, and what became of them."""

    def __init__(self, sizes: Sequence[Sequence[int]], seed: int) -> None:
        self._sizes = sizes
        self._rng = random.Random(seed)
        self._ends = {KEY: 0, OTHER: 0}
        self.acknowledged: Found = {}
        self.in_flight: Found = {}

    def run(self, wal: FileWal) -> None:
        for group in self._sizes:
            ends = dict(self._ends)
            frames = [self._frame(size_bytes, ends) for size_bytes in group]
            self.in_flight = {(frame.key, frame.base_offset): frame.batch for frame in frames}
            try:
                wal.append(frames)
            except WalFull:
                continue
            self.acknowledged |= self.in_flight
            self._ends = ends
        self.in_flight = {}
        wal.close()

    def _frame(self, size_bytes: int, ends: dict[RangeKey, int]) -> Frame:
        key = self._rng.choice((KEY, OTHER))
        value = bytes(size_bytes) if self._rng.random() < 0.3 else self._rng.randbytes(size_bytes)
        made = plain(ends[key], value, key)
        ends[key] += 1
        return made


def read_back(directory: WalDirectory, found: Replayed) -> Found:
    reader, batches = FileBatchReader(directory), {}
    for key, log in found.replay.logs.items():
        for buffer in log.buffers:
            picked = buffer.pick(buffer.base_offset, buffer.end_offset, 1 << 30)
            offset = buffer.base_offset
            for (position, _), batch in zip(picked, reader.read([position for position, _ in picked]), strict=True):
                assert position.size_bytes == len(batch)
                batches[key, offset] = batch
                offset += 1
    return batches


def check_what_is_left(path: Path, writing: Writing, *, was_killed: bool) -> None:
    """Replays; goes on in a new epoch; replays again."""
    directory = WalDirectory.open(path, "agent-1")
    found = replay(directory)
    left = read_back(directory, found)
    assert left.items() >= writing.acknowledged.items(), "G1: what was acknowledged is there"
    assert left.items() <= (writing.acknowledged | writing.in_flight).items(), "nobody wrote it, or it had failed"
    for key in (KEY, OTHER):
        assert sorted(offset for log, offset in left if log == key) == list(range(sum(log == key for log, _ in left)))
    assert (found.replay.damage, found.replay.gaps.corrupt_frames) == ([], False), "an unfinished write is no damage"
    assert not (was_killed and found.replay.gaps), "nor does a kill leave a doubt"
    wal = new_wal(directory, found.next_sequence, before=found.previous_size_bytes)
    wal.mark_settled()
    later = RangeKey(*KEY.partition_key, 2)
    wal.append([plain(1000, b"later", later)])
    again = replay(directory)
    assert read_back(directory, again) == left | {(later, 1000): plain(1000, b"later", later).batch}
    assert not again.replay.gaps
    assert found.replay.gaps.torn_tail or not again.replay.damage
    wal.close()
    directory.close()


@pytest.mark.long
@pytest.mark.usefixtures("_quick")
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.lists(st.sampled_from((1, 40, 300, 340, 900, 2500)), min_size=1, max_size=5), max_size=14),
    cut_at=st.integers(1, 90),
    room_bytes=st.sampled_from((1 << 30, 1 << 30, 5_000, 12_000)),
    file_bytes=st.sampled_from((4_000, 30_000)),
    seed=st.integers(0, 1 << 32),
    was_killed=st.booleans(),
)
def test_g1_whatever_a_crash_leaves_what_was_acknowledged_is_found_and_nothing_else_counts(
    sizes: list[list[int]], cut_at: int, room_bytes: int, file_bytes: int, seed: int, was_killed: bool
) -> None:
    """Of what was not synced, each sector is there or not, and the file has a size that it had meanwhile."""
    writing = Writing(sizes, seed)
    disk = Disk(cut_at, room_bytes)
    rng = random.Random(seed)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "wal"
        directory = WalDirectory.open(path, "agent-1")
        wal = new_wal(directory, file_bytes=file_bytes)
        try:
            with mock.patch.object(wal_module, "os", disk):
                writing.run(wal)
        except PowerCut:
            for name, since in disk.since.items():
                leave = after_a_kill if was_killed else after_a_power_cut
                (path / name).write_bytes(leave(disk.durable[name], since, rng))
        directory.close()
        check_what_is_left(path, writing, was_killed=was_killed)


GROUPS = [[300], [100, 900, 40], [1], [2500, 1], [9000, 300], [700], [1, 1], [1500], [300]]


class Killing:
    """The module `os` of a process that is killed at its `last`-th call to do with files: before it, or in the middle
    of a write."""

    def __init__(self, last: int, kept_share: float) -> None:
        self._left = last
        self._kept_share = kept_share

    def __getattr__(self, name: str) -> Any:
        call = getattr(os, name)
        if name not in ("open", "write", "pwrite", "pwritev", "ftruncate", "fsync", "fdatasync", "close"):
            return call

        def run(*arguments: Any) -> Any:
            self._left -= 1
            if self._left > 0:
                return call(*arguments)
            if name in ("pwrite", "pwritev") and self._kept_share:
                fd, data, at = arguments
                whole = b"".join(data) if name == "pwritev" else bytes(data)
                os.pwrite(fd, whole[: max(1, int(len(whole) * self._kept_share))], at)
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError("not killed")

        return run


def write_until_killed(path: Path, last: int, kept_share: float) -> tuple[bool, int]:
    """Whether a process was killed before it came to its end, and how many groups it had acknowledged."""
    reading, telling = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            killing = Killing(last, kept_share)
            directory = WalDirectory.open(path, "agent-1")
            wal = new_wal(directory, file_bytes=14_000)
            append = wal.append

            def told(frames: Sequence[Frame]) -> object:
                positions = append(frames)
                os.write(telling, b".")
                return positions

            with (
                mock.patch.object(wal_module, "os", killing),
                mock.patch.object(files, "os", killing),
                mock.patch.object(wal, "append", told),
            ):
                Writing(GROUPS, seed=5).run(wal)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(telling)
    with os.fdopen(reading, "rb") as told_of:
        acknowledged = len(told_of.read())
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL), f"the writer failed: {status}"
    return status != 0, acknowledged


@pytest.mark.long
@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("kept_share", [0.0, 0.01, 0.6])
def test_g1_a_kill_at_any_system_call_leaves_no_doubt(tmp_path: Path, kept_share: float) -> None:
    last, is_killed = 0, True
    while is_killed:
        last += 1
        path = tmp_path / str(last)
        is_killed, acknowledged = write_until_killed(path, last, kept_share)
        expected = Writing(GROUPS[: acknowledged + 1], seed=5)
        told = Writing(GROUPS[:acknowledged], seed=5)
        with TemporaryDirectory() as folder:
            for number, writing in enumerate((expected, told)):
                directory = WalDirectory.open(Path(folder) / str(number), "agent-1")
                writing.run(FileWal(directory, 1, file_bytes=1 << 30, fsync_each=True))
                directory.close()
        told.in_flight = expected.acknowledged
        check_what_is_left(path, told, was_killed=True)
    assert acknowledged == len(GROUPS)
    assert last > 3 * len(GROUPS), "body, first byte and sync of each group, at least"


def test_the_header_is_all_that_a_file_needs_to_say(directory: WalDirectory) -> None:
    """What the writer declares is what replays allow, rounded up to whole units."""
    wal = FileWal(directory, 1, file_bytes=1 << 20, fsync_each=True, ahead_bytes=5000)
    wal.append([plain(0, b"a")])
    data = directory.file_path(1).read_bytes()
    assert decode_wal_file_header(data).ahead_bytes == 8192
    assert WAL_FILE_HEADER_SIZE < wal.active_bytes < len(data) <= wal.active_bytes + 5000
    wal.close()
