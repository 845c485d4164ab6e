"""The write-ahead log on a real directory: groups, rotation, full disks, replay of what damage leaves."""

import errno
import os
import signal
import stat
import struct
import subprocess
import sys
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from shformat import (
    FRAME_HEADER_SIZE,
    WAL_FILE_HEADER_SIZE,
    ProducerStamp,
    encode_frame_header,
)
from shproto.keys import RangeKey
from shruntime import files
from streamhouse_ingest.adapters.wal import FileBatchReader, FileWal
from streamhouse_ingest.adapters.wal_directory import WalDirectory
from streamhouse_ingest.adapters.wal_replay import replay_directory
from streamhouse_ingest.log.buffer import WalPosition
from streamhouse_ingest.ports import (
    Frame,
    WalBroken,
    WalDamaged,
    WalDirectoryError,
    WalFileGone,
    WalFull,
    WalLocked,
    WrongIdentity,
)

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


def new_wal(
    directory: WalDirectory, next_sequence: int = 1, *, file_bytes: int = 1 << 20, previous_size_bytes: int = 0
) -> FileWal:
    return FileWal(
        directory, next_sequence, file_bytes=file_bytes, fsync_each=True, previous_size_bytes=previous_size_bytes
    )


def write_three(directory: WalDirectory) -> tuple[Path, list[int]]:
    """Three frames of one log in one file; their end positions."""
    wal = new_wal(directory)
    positions = wal.append([frame(0, b"a" * 50), frame(1, b"b" * 50), frame(2, b"c" * 50)])
    wal.close()
    return directory.file_path(1), [p.at + p.size_bytes for p in positions]


# ---- directory


def test_a_second_opener_is_refused_and_told_who_holds_it(tmp_path: Path):
    first = WalDirectory.open(tmp_path, "agent-1")
    with pytest.raises(WalLocked, match=f"pid {os.getpid()}"):
        WalDirectory.open(tmp_path, "agent-1")
    first.close()
    WalDirectory.open(tmp_path, "agent-1").close()


def test_the_identity_stays_and_belongs_to_one_agent(tmp_path: Path):
    first = WalDirectory.open(tmp_path, "agent-1")
    first.close()
    again = WalDirectory.open(tmp_path, "agent-1")
    assert again.wal_id == first.wal_id
    again.mark_used()
    again.close()
    with pytest.raises(WrongIdentity, match=r"belongs to agent 'agent-1', this one is 'agent-2'") as caught:
        WalDirectory.open(tmp_path, "agent-2")
    assert "there are no records in this one: delete it if no agent 'agent-1'" in str(caught.value)


def test_a_directory_that_was_never_used_goes_to_whichever_agent_is_let_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    first = WalDirectory.open(Path("wal"), "agent-1")
    first.close()
    second = WalDirectory.open(Path("wal"), "agent-2")
    assert second.wal_id == first.wal_id, "what the coordinator may know of it ends as superseded"
    second.mark_used()
    second.close()
    with pytest.raises(WrongIdentity) as caught:
        WalDirectory.open(Path("wal"), "agent-1")
    assert str(caught.value).startswith(f"{tmp_path}/wal: belongs to agent 'agent-2', this one is 'agent-1'")


def test_g2_a_directory_that_held_a_record_keeps_its_owner_when_its_files_are_gone(tmp_path: Path):
    directory = WalDirectory.open(tmp_path, "agent-1")
    path, _ = write_three(directory)
    directory.close()
    with pytest.raises(WrongIdentity) as caught:
        WalDirectory.open(directory.path, "agent-2")
    assert "delete it" not in str(caught.value)
    path.unlink()
    with pytest.raises(WrongIdentity):
        WalDirectory.open(directory.path, "agent-2")


@pytest.mark.parametrize("name", ["history", "settled", "unsynced", "opening"])
def test_a_note_of_a_log_keeps_its_owner_though_an_older_version_left_the_mark(tmp_path: Path, name: str):
    """Versions that do not know the mark leave it in a directory that they write records to."""
    WalDirectory.open(tmp_path, "agent-1").close()
    (tmp_path / name).write_text("")
    with pytest.raises(WrongIdentity):
        WalDirectory.open(tmp_path, "agent-2")


def test_the_mark_of_an_unused_directory_is_gone_for_good_before_its_first_file(
    directory: WalDirectory, monkeypatch: pytest.MonkeyPatch
):
    found: list[list[Path]] = []

    def fail(path: Path) -> None:
        found.append(list(path.glob("*.wal")))
        raise OSError(errno.EIO, "injected")

    wal = new_wal(directory)
    with monkeypatch.context() as patched:
        patched.setattr(files, "sync_directory", fail)
        with pytest.raises(WalBroken):
            wal.append([frame(0, b"a")])
    assert found == [[]], "no file is made before the mark's end is durable"


def test_the_log_is_nobody_elses_to_read_nor_is_one_of_an_older_version(tmp_path: Path):
    directory = WalDirectory.open(tmp_path / "wal", "agent-1")
    new_wal(directory).append([frame(0, b"secret")])
    directory.close()
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "wal").iterdir()}
    assert set(modes.values()) == {0o600}
    assert stat.S_IMODE((tmp_path / "wal").stat().st_mode) == 0o700
    (tmp_path / "wal").chmod(0o755)
    WalDirectory.open(tmp_path / "wal", "agent-1").close()
    assert stat.S_IMODE((tmp_path / "wal").stat().st_mode) == 0o700


@pytest.mark.parametrize("content", ["", "[]", '{"version": 1, "agent_id": "agent-1", "wal_id": "00"}', "{}"])
def test_an_identity_that_is_not_one_is_refused(tmp_path: Path, content: str):
    (tmp_path / "identity").write_text(content)
    with pytest.raises(WrongIdentity):
        WalDirectory.open(tmp_path, "agent-1")


def test_log_files_without_an_identity_are_refused(tmp_path: Path):
    (tmp_path / f"{1:020d}.wal").write_bytes(b"")
    with pytest.raises(WrongIdentity, match="no identity file"):
        WalDirectory.open(tmp_path, "agent-1")


def test_a_foreign_file_is_refused(directory: WalDirectory):
    (directory.path / "7.wal").write_bytes(b"")
    with pytest.raises(WalDirectoryError, match=r"7\.wal"):
        replay(directory)


def test_a_file_of_another_log_is_refused(directory: WalDirectory, tmp_path: Path):
    other = WalDirectory.open(tmp_path / "other", "agent-1")
    path, _ = write_three(other)
    other.close()
    directory.file_path(1).write_bytes(path.read_bytes())
    with pytest.raises(WrongIdentity, match="belongs to log"):
        replay(directory)


# ---- writing and reading back


def test_what_was_written_is_replayed_and_read_back(directory: WalDirectory):
    wal = new_wal(directory)
    stamp = ProducerStamp(9, 1, 40)
    frames = [frame(5, b"a", b"b", producer=stamp), frame(0, b"x", key=OTHER), frame(7, b"c")]
    written = wal.append(frames)
    wal.close()
    found = replay(directory)
    assert spans(found) == [(5, 8)]
    assert spans(found, OTHER) == [(0, 1)]
    assert [*positions_of(found), *positions_of(found, OTHER)] == [written[0], written[2], written[1]]
    assert FileBatchReader(directory).read(written) == [f.batch for f in frames]
    state = found.replay.producers[KEY.partition_key][9]
    assert (state.producer_epoch, state.next_sequence, state.batches[0].base_offset) == (1, 42, 5)
    assert found.next_sequence == 2
    assert found.index.size_bytes == directory.file_path(1).stat().st_size


def test_files_rotate_by_size_and_a_group_stays_in_one(directory: WalDirectory):
    wal = new_wal(directory, file_bytes=1000)
    files = [p.file for i in range(6) for p in wal.append([frame(2 * i, b"v" * 150), frame(2 * i + 1, b"w" * 150)])]
    wal.close()
    assert files == sorted(files)
    assert all(files[i] == files[i + 1] for i in range(0, 12, 2))
    assert len(set(files)) > 2
    assert all(directory.file_path(f).stat().st_size <= 1000 for f in set(files))
    assert spans(replay(directory)) == [(0, 12)]


def test_a_new_log_goes_on_in_a_new_file(directory: WalDirectory):
    write_three(directory)
    wal = new_wal(directory, replay(directory).next_sequence)
    wal.append([frame(3, b"d")])
    wal.close()
    assert directory.sequences() == [1, 2]
    assert spans(replay(directory)) == [(0, 4)]


def test_g6_a_deleted_file_stays_deleted_before_the_next_one_goes(
    directory: WalDirectory, monkeypatch: pytest.MonkeyPatch
):
    """A power cut that undid one deletion and not a later one would leave a hole, which is damage."""
    wal = new_wal(directory, file_bytes=100)
    for base in range(4):
        wal.append([frame(base, b"x" * 50)])
    left_at_sync: list[list[int]] = []
    monkeypatch.setattr(directory, "sync", lambda: left_at_sync.append(directory.sequences()))
    wal.delete(1)
    wal.delete(2)
    assert left_at_sync == [[2, 3, 4], [3, 4]]
    wal.close()


def test_reading_checks_every_batch(directory: WalDirectory):
    wal = new_wal(directory)
    positions = wal.append([frame(i, b"%d" % i * 40) for i in range(5)])
    wal.close()
    path = directory.file_path(1)
    flip(path, positions[3].at + 90)
    reader = FileBatchReader(directory)
    assert len(reader.read(positions[:3])) == 3
    with pytest.raises(WalDamaged) as caught:
        reader.read(positions)
    assert caught.value.position == positions[3]
    assert path.name in str(caught.value)
    path.unlink()
    with pytest.raises(WalFileGone):
        reader.read(positions)


def test_many_small_frames_need_more_than_one_system_call(directory: WalDirectory):
    wal = new_wal(directory, file_bytes=1 << 30)
    frames = [frame(i, b"v") for i in range(3000)]
    positions = wal.append(frames)
    wal.close()
    assert FileBatchReader(directory).read(positions) == [f.batch for f in frames]
    assert spans(replay(directory)) == [(0, 3000)]


# ---- disks that are full or broken


def test_g7_a_directory_is_opened_on_a_full_disk(tmp_path: Path):
    """Found by simulation: a power cut had taken the lock file's content, and there was no room for it."""
    path = tmp_path / "wal"
    WalDirectory.open(path, "agent-1").close()
    (path / "lock").write_bytes(b"")
    with full_disk(0):
        again = WalDirectory.open(path, "agent-1")
    try:
        with pytest.raises(WalLocked, match="pid unknown"):
            WalDirectory.open(path, "agent-1")
    finally:
        again.close()


KILLED_ASKING_FOR_ROOM = """
import os, signal, sys
from pathlib import Path
from streamhouse_ingest.adapters.wal_directory import WalDirectory
def killed(fd, at, size_bytes):
    os.ftruncate(fd, size_bytes)
    os.kill(os.getpid(), signal.SIGKILL)
os.posix_fallocate = killed
WalDirectory.open(Path(sys.argv[1]), "agent-1").has_space(4096)
"""


def test_what_a_process_that_was_killed_asked_for_room_with_is_removed(tmp_path: Path):
    """A file as large as one of the log, which stayed on a disk that was full."""
    path = tmp_path / "wal"
    ended = subprocess.run([sys.executable, "-c", KILLED_ASKING_FOR_ROOM, str(path)], timeout=60)
    assert ended.returncode == -signal.SIGKILL
    left = (path / "room").stat()
    assert (left.st_size, left.st_mode & 0o777) == (4096, 0o600)
    WalDirectory.open(path, "agent-1").close()
    assert not (path / "room").exists()


def test_a_full_disk_leaves_nothing_of_the_group_and_writing_goes_on_when_there_is_space(directory: WalDirectory):
    wal = new_wal(directory)
    wal.append([frame(0, b"a")])
    good = wal.active_bytes
    with full_disk(good + 5000):
        for _ in range(2):
            with pytest.raises(WalFull):
                wal.append([frame(1, b"b"), frame(2, os.urandom(20_000))])
            assert directory.file_path(1).stat().st_size == good
    wal.append([frame(1, b"c")])
    wal.close()
    found = replay(directory)
    assert (spans(found), found.replay.damage) == ([(0, 2)], [])
    assert FileBatchReader(directory).read(positions_of(found))[1] == frame(1, b"c").batch


def test_a_disk_too_full_for_a_new_file_leaves_no_file(directory: WalDirectory):
    wal = new_wal(directory)
    with full_disk(10), pytest.raises(WalFull):
        wal.append([frame(0, b"a")])
    assert directory.sequences() == []
    wal.append([frame(0, b"a")])
    wal.close()
    assert spans(replay(directory)) == [(0, 1)]


def test_a_failed_fsync_breaks_the_log_for_good(directory: WalDirectory, monkeypatch: pytest.MonkeyPatch):
    wal = new_wal(directory)
    wal.append([frame(0, b"a")])

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(WalBroken, match="fdatasync"):
        wal.append([frame(1, b"b")])
    monkeypatch.undo()
    with pytest.raises(WalBroken):
        wal.append([frame(1, b"b")])
    wal.close()


# ---- damage


def test_a_tail_torn_at_any_byte_of_the_last_frame_is_cut_off(directory: WalDirectory):
    path, ends = write_three(directory)
    whole = path.read_bytes()
    for size in range(ends[1], ends[2]):
        path.write_bytes(whole[:size])
        found = replay(directory)
        assert spans(found) == [(0, 2)], size
        assert found.replay.damage == []
        assert path.stat().st_size == ends[1] == found.index.size_bytes
    path.write_bytes(whole)
    assert spans(replay(directory)) == [(0, 3)]


@pytest.mark.parametrize("zeros", [5000, 300])
def test_a_zero_filled_tail_ends_the_log_but_may_have_been_more_than_a_torn_write(directory: WalDirectory, zeros: int):
    """Also within one sector: a file need not end with one."""
    path, ends = write_three(directory)
    whole = path.read_bytes()
    for good in (ends[1], ends[1] + 7, ends[2]):
        path.write_bytes(whole[:good] + bytes(zeros))
        for _ in range(2):
            found = replay(directory)
            assert spans(found) == [(0, 3 if good == ends[2] else 2)]
            gaps = found.replay.gaps
            assert (found.replay.damage, gaps.torn_tail, gaps.corrupt_frames) == ([], True, False)
    directory.mark_settled(found.next_sequence)
    assert not replay(directory).replay.gaps


def test_a_file_that_was_only_just_created_is_removed_and_its_number_used_again(directory: WalDirectory):
    path, _ = write_three(directory)
    for content in (b"", path.read_bytes()[:20], path.read_bytes()[:WAL_FILE_HEADER_SIZE]):
        directory.file_path(2).write_bytes(content)
        found = replay(directory)
        assert (spans(found), found.replay.damage, found.next_sequence) == ([(0, 3)], [], 2)
        assert directory.sequences() == [1]
    path.unlink()
    directory.file_path(2).write_bytes(b"")
    assert replay(directory).next_sequence == 2


def test_g2_damage_that_hides_headers_leaves_the_ends_of_logs_unknown_that_have_no_later_frame(directory: WalDirectory):
    wal = new_wal(directory)
    frames = [frame(0, b"a"), frame(0, b"x", key=OTHER), frame(1, b"b"), frame(1, b"y", key=OTHER)]
    first, _, hidden, _ = wal.append(frames)
    wal.close()
    path = directory.file_path(1)
    whole = path.read_bytes()
    assert not replay(directory).replay.gaps
    flip(path, hidden.at - FRAME_HEADER_SIZE)
    gaps = replay(directory).replay.gaps
    assert gaps.corrupt_frames
    assert not gaps.knows_end(KEY)
    assert gaps.knows_end(OTHER)
    assert not gaps.knows_end(RangeKey(b"t" * 16, 7, 1)), "nor is it known of those that have no frame left"
    path.write_bytes(whole)
    flip(path, first.at - FRAME_HEADER_SIZE)
    gaps = replay(directory).replay.gaps
    assert gaps.knows_end(KEY) and gaps.knows_end(OTHER)
    directory.mark_settled(2)
    assert not replay(directory).replay.gaps


def test_no_file_is_begun_before_it_is_noted_that_the_damage_of_older_ones_was_told(directory: WalDirectory):
    """On a full disk it cannot be; what is written once there is room must not be doubted because of it."""
    old = new_wal(directory)
    first, _ = old.append([frame(0, b"a"), frame(1, b"b")])
    old.close()
    flip(directory.file_path(1), first.at - FRAME_HEADER_SIZE)
    found = replay(directory)
    assert found.replay.gaps.corrupt_frames
    wal = new_wal(directory, found.next_sequence)
    with full_disk(0):
        with pytest.raises(OSError, match="large"):
            wal.mark_settled()
        with pytest.raises(WalFull):
            wal.append([frame(2, b"c")])
    assert directory.sequences() == [1]
    wal.append([frame(2, b"c")])
    wal.close()
    assert not replay(directory).replay.gaps


def test_g2_notes_of_a_log_that_was_given_away_say_nothing_of_the_files_that_begin_anew(directory: WalDirectory):
    """File numbers begin at 1 again once the log is empty; below the number in an old note new damage would be none."""
    old = new_wal(directory, 8)
    old.append([frame(0, b"a")])
    old.close()
    old.mark_settled()
    old.opening_token("a:1", str(uuid.UUID(int=1)))
    old.delete(8)
    assert replay(directory).next_sequence == 1
    new = new_wal(directory)
    _, hidden = new.append([frame(1, b"b"), frame(2, b"acknowledged")])
    new.close()
    flip(directory.file_path(1), hidden.at - FRAME_HEADER_SIZE)
    gaps = replay(directory).replay.gaps
    assert gaps.corrupt_frames and not gaps.knows_end(KEY)
    assert new_wal(directory, 8).opening_token("a:1", str(uuid.UUID(int=2))) == str(uuid.UUID(int=2))


def test_a_session_id_is_noted_for_as_long_as_nothing_is_written(directory: WalDirectory):
    first, second, third = (str(uuid.UUID(int=number)) for number in range(3))
    wal = new_wal(directory)
    assert wal.opening_token("a:1", first) == first
    assert new_wal(directory).opening_token("a:1", second) == first, "the next process asks for the same"
    assert new_wal(directory).opening_token("a:2", second) == second, "the coordinator knows the session by its address"
    wal.append([frame(0, b"a")])
    wal.close()
    later = FileWal(directory, replay(directory).next_sequence, file_bytes=1 << 20, fsync_each=True)
    assert later.opening_token("a:2", third) == third
    later.mark_settled()
    assert later.opening_token("a:2", first) == first
    for content in ("", "{}", "[]", "null", '{"version": 1, "sequence": 1, "address": "a:1", "session_id": "x"}'):
        (directory.path / "opening").write_text(content)
        assert new_wal(directory).opening_token("a:1", second) == second


def test_g2_the_last_frame_is_never_taken_for_a_torn_write_when_it_is_all_there(directory: WalDirectory):
    path, ends = write_three(directory)
    whole = path.read_bytes()
    for at in range(ends[1], ends[2]):
        flip(path, at)
        found = replay(directory)
        assert (spans(found), len(found.replay.damage)) == ([(0, 2)], 1), at
        assert found.replay.gaps.knows_end(KEY) == (found.replay.logs[KEY].end_offset == 3), "lost by name, or doubt"
        path.write_bytes(whole)


def test_damage_that_reaches_beyond_a_known_frame_hides_what_followed(directory: WalDirectory):
    path, ends = write_three(directory)
    flip(path, ends[1] - 1)
    flip(path, ends[1])
    gaps = replay(directory).replay.gaps
    assert gaps.corrupt_frames
    assert path.stat().st_size == ends[2]


def test_what_a_killed_process_wrote_is_synced_before_retries_are_answered_from_it(
    directory: WalDirectory, monkeypatch: pytest.MonkeyPatch
):
    path, _ = write_three(directory)
    synced: list[str] = []
    fsync = os.fsync

    def noted(fd: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{fd}").readlink()))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", noted)
    replay(directory)
    assert synced == [str(path)]


def test_a_flipped_bit_in_the_middle_is_a_hole_never_the_end(directory: WalDirectory):
    path, ends = write_three(directory)
    start = ends[0]
    whole = path.read_bytes()
    for at in range(start, ends[1]):
        flip(path, at)
        found = replay(directory)
        assert spans(found) == [(0, 1), (2, 3)], at
        assert [d.file for d in found.replay.damage] == [1]
        assert (found.replay.damage[0].at, found.replay.damage[0].size_bytes) == (start, ends[1] - start)
        path.write_bytes(whole)


def test_a_damaged_last_frame_of_one_log_is_known_by_its_header(directory: WalDirectory):
    wal = new_wal(directory)
    positions = wal.append([frame(0, b"a"), frame(1, b"b", b"c"), frame(0, b"x", key=OTHER)])
    wal.close()
    flip(directory.file_path(1), positions[1].at + 50)
    found = replay(directory)
    assert spans(found) == [(0, 1)]
    assert found.replay.logs[KEY].end_offset == 3


def test_damage_at_the_end_of_a_file_that_is_not_the_last_is_no_torn_tail(directory: WalDirectory):
    path, ends = write_three(directory)
    wal = new_wal(directory, 2)
    wal.append([frame(0, b"x", key=OTHER)])
    wal.close()
    size = path.stat().st_size
    flip(path, ends[2] - 1)
    found = replay(directory)
    assert (spans(found), found.replay.logs[KEY].end_offset) == ([(0, 2)], 3)
    assert len(found.replay.damage) == 1
    assert path.stat().st_size == size


def test_a_missing_file_in_the_middle_is_damage(directory: WalDirectory):
    for sequence in (1, 2, 3):
        wal = new_wal(directory, sequence)
        wal.append([frame(sequence, b"v")])
        wal.close()
    directory.file_path(2).unlink()
    found = replay(directory)
    assert spans(found) == [(1, 2), (3, 4)]
    assert found.replay.gaps.corrupt_frames
    assert [(d.file, "missing" in d.reason) for d in found.replay.damage] == [(2, True)]


def write_files(directory: WalDirectory, count: int) -> list[list[WalPosition]]:
    """Files of three frames each, one log over all of them."""
    wal = new_wal(directory, file_bytes=700)
    written = [wal.append([frame(3 * n + i, b"v" * 50) for i in range(3)]) for n in range(count)]
    wal.close()
    assert directory.sequences() == list(range(1, count + 1))
    return written


def test_g6_a_file_cut_off_between_two_frames_is_known_by_the_header_of_the_next_one(directory: WalDirectory):
    written = write_files(directory, 3)
    path = directory.file_path(2)
    whole = path.read_bytes()
    for kept in range(3):
        path.write_bytes(whole[: written[1][kept].at - FRAME_HEADER_SIZE])
        found = replay(directory)
        assert spans(found) == [(0, 3 + kept), (6, 9)]
        (damage,) = found.replay.damage
        assert (damage.file, damage.at + damage.size_bytes) == (2, len(whole))
        assert found.replay.gaps.corrupt_frames, "frames of any log may have been there"
        assert found.replay.gaps.knows_end(KEY), "there is a later frame"
        assert directory.sequences() == [1, 2, 3]
    path.write_bytes(whole)
    assert not replay(directory).replay.damage
    directory.mark_settled(3)
    path.write_bytes(whole[: written[1][2].at - FRAME_HEADER_SIZE])
    assert not replay(directory).replay.gaps, "the coordinator knows"


def test_g6_a_file_that_was_only_just_created_bears_witness_of_the_one_before(directory: WalDirectory):
    """It has no frame, but it stays until what it says has been told."""
    written = write_files(directory, 2)
    first, second = directory.file_path(1), directory.file_path(2)
    second.write_bytes(second.read_bytes()[:WAL_FILE_HEADER_SIZE])
    whole = first.read_bytes()
    first.write_bytes(whole[: written[0][2].at - FRAME_HEADER_SIZE])
    for _ in range(2):
        found = replay(directory)
        assert (spans(found), found.replay.gaps.corrupt_frames, found.next_sequence) == ([(0, 2)], True, 3)
        assert found.previous_size_bytes == WAL_FILE_HEADER_SIZE
    first.write_bytes(whole)
    found = replay(directory)
    assert (found.replay.damage, found.next_sequence, found.previous_size_bytes) == ([], 2, len(whole))


@pytest.mark.long
def test_a_crash_at_any_byte_of_a_rotation_is_no_damage(directory: WalDirectory):
    """The file before is complete and synced before the next one exists; that one has its header before a frame."""
    write_files(directory, 2)
    path = directory.file_path(2)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        found = replay(directory)
        assert not found.replay.damage and not found.replay.gaps, size
        assert found.next_sequence == (3 if spans(found)[-1][1] > 3 else 2)
    for size in range(WAL_FILE_HEADER_SIZE):  # sectors that never reached the disk
        path.write_bytes(bytes(size))
        assert not replay(directory).replay.damage
        assert directory.sequences() == [1]


def test_after_a_torn_tail_the_next_file_says_where_it_was_cut_off(directory: WalDirectory):
    path, ends = write_three(directory)
    path.write_bytes(path.read_bytes()[:-1])
    found = replay(directory)
    assert found.previous_size_bytes == ends[1] == path.stat().st_size
    wal = new_wal(directory, found.next_sequence, previous_size_bytes=found.previous_size_bytes)
    wal.append([frame(2, b"d")])
    wal.close()
    found = replay(directory)
    assert (spans(found), found.replay.damage) == ([(0, 3)], [])


def test_what_lies_beyond_the_known_end_of_a_file_is_no_part_of_the_log(directory: WalDirectory):
    """What a group that did not fit may leave when the power fails before its removal has reached the disk."""
    write_files(directory, 2)
    path = directory.file_path(1)
    whole = path.read_bytes()
    left = frame(3, b"never acknowledged")
    header = encode_frame_header(*left.key, left.base_offset, left.record_count, left.batch)
    path.write_bytes(whole + header + left.batch)
    found = replay(directory)
    assert (spans(found), found.replay.damage, found.replay.gaps.corrupt_frames) == ([(0, 6)], [], False)
    assert FileBatchReader(directory).read(positions_of(found))[3] == frame(3, b"v" * 50).batch


def test_a_log_of_version_1_is_read_and_gone_on_with(directory: WalDirectory):
    path, _ = write_three(directory)
    body = struct.pack("<4sHH16sQ", b"SHWL", 1, 0, directory.wal_id, 1)
    path.write_bytes(body + zlib.crc32(body).to_bytes(4, "little") + path.read_bytes()[WAL_FILE_HEADER_SIZE:])
    found = replay(directory)
    assert (spans(found), found.replay.damage, found.previous_size_bytes) == ([(0, 3)], [], path.stat().st_size)
    wal = new_wal(directory, 2, previous_size_bytes=found.previous_size_bytes)
    wal.append([frame(3, b"d")])
    wal.close()
    found = replay(directory)
    assert (spans(found), found.replay.damage) == ([(0, 4)], [])
    assert len(FileBatchReader(directory).read(positions_of(found))) == 4


def test_g6_what_the_disk_does_not_give_back_is_damage_in_the_middle_and_the_tail_at_the_end(
    directory: WalDirectory, monkeypatch: pytest.MonkeyPatch
):
    """A mapped page that cannot be read would kill the process, at every start."""
    wal = new_wal(directory)
    positions = wal.append([frame(i, os.urandom(8000)) for i in range(4)])
    wal.close()
    path = directory.file_path(1)
    middle, last = positions[1].at + 4096, positions[3].at + 4096
    with unreadable(monkeypatch, path, middle, middle + 1):
        found = replay(directory)
        assert spans(found) == [(0, 1), (2, 4)]
        assert found.replay.logs[KEY].end_offset == 4 and len(found.replay.damage) == 1
        with pytest.raises(WalDamaged):
            FileBatchReader(directory).read(positions)
        assert len(FileBatchReader(directory).read(positions[2:])) == 2
    with unreadable(monkeypatch, path, last, path.stat().st_size):
        found = replay(directory)
        assert (spans(found), found.replay.damage, found.replay.gaps.torn_tail) == ([(0, 3)], [], True)
    assert not replay(directory).replay.gaps


def test_g1_what_an_fsync_that_failed_left_in_the_page_cache_is_not_believed(
    directory: WalDirectory, monkeypatch: pytest.MonkeyPatch
):
    """The last file is synced, then dropped from the cache, before the first byte of it is looked at."""
    write_files(directory, 2)
    done: list[tuple[str, str]] = []

    def noted(name: str, call: Callable[..., object]) -> Callable[..., object]:
        def run(fd: int, *arguments: int) -> object:
            done.append((name, Path(f"/proc/self/fd/{fd}").readlink().name))
            return call(fd, *arguments)

        return run

    for name in ("fsync", "posix_fadvise", "pread"):
        monkeypatch.setattr(os, name, noted(name, getattr(os, name)))
    replay(directory)
    of_last = [name for name, file in done if file == directory.file_path(2).name]
    assert of_last[of_last.index("fsync") :][:3] == ["fsync", "posix_fadvise", "pread"]
    assert ("posix_fadvise", directory.file_path(1).name) not in done, "it was synced before the second one was begun"


def test_a_damaged_file_header_does_not_cost_its_frames(directory: WalDirectory):
    path, _ = write_three(directory)
    flip(path, 10)
    found = replay(directory)
    assert spans(found) == [(0, 3)]
    assert [(d.file, d.at) for d in found.replay.damage] == [(1, 0)]


def test_a_frame_that_would_change_an_offset_is_damage(directory: WalDirectory):
    wal = new_wal(directory)
    wal.append([frame(0, b"a", b"b"), frame(1, b"other"), frame(2, b"c")])
    wal.close()
    found = replay(directory)
    assert spans(found) == [(0, 3)]
    assert len(positions_of(found)) == 2
    assert len(found.replay.damage) == 1


def test_frames_that_hold_no_batch_are_damage_and_the_others_are_not(directory: WalDirectory):
    wal = new_wal(directory)
    frames = [frame(n, b"v") for n in range(11)]
    for n in (0, 4, 5, 10):
        frames[n] = Frame(
            key=KEY, base_offset=n, record_count=1, batch=frames[n].batch[:24] + b"\x09" + frames[n].batch[25:]
        )
    wal.append(frames)
    wal.close()
    found = replay(directory)
    assert spans(found) == [(1, 4), (6, 10)]
    assert found.replay.logs[KEY].end_offset == 11
    assert [damage.reason for damage in found.replay.damage] == ["batch version is 9, this reader knows 1"] * 4
    assert not found.replay.gaps, "the frames say what is lost"


def test_replayed_buffers_are_cut_at_the_sealing_size(directory: WalDirectory):
    wal = new_wal(directory)
    wal.append([frame(i, os.urandom(1000)) for i in range(10)])
    wal.close()
    found = replay_directory(directory, 3000)
    sizes = [b.size_bytes for b in found.replay.logs[KEY].buffers]
    assert spans(found)[0][0] == 0
    assert spans(found)[-1][1] == 10
    assert len(sizes) == 4
    assert max(sizes) < 3000 + 1200


def test_frame_sizes_are_what_the_positions_say(directory: WalDirectory):
    wal = new_wal(directory)
    first, second = wal.append([frame(0, b"a"), frame(1, b"b")])
    wal.close()
    assert first.at == WAL_FILE_HEADER_SIZE + FRAME_HEADER_SIZE
    assert second.at == first.at + first.size_bytes + FRAME_HEADER_SIZE
