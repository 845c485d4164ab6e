"""The data directory: one process at a time, and nobody else's to read."""

import errno
import os
import stat
from pathlib import Path
from typing import NoReturn

import pytest
from streamhouse_embedded.data_dir import DataDir, DataDirError
from streamhouse_embedded.postgres import EmbeddedPostgres, PostgresError


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def take(path: Path) -> None:
    data_dir = DataDir(path)
    data_dir.lock()
    data_dir.unlock()


def test_a_new_one_is_closed_to_others_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        take(tmp_path / "deep" / "data")
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "deep") == mode_of(tmp_path / "deep" / "data") == 0o700
    assert mode_of(tmp_path / "deep" / "data" / "lock") == 0o600


def open_to_all(path: Path) -> None:
    """What versions before this one left."""
    for name in ("objects", "wal", "cache", "postgres"):
        (path / name).mkdir(parents=True, mode=0o755)
    (path / "lock").touch(mode=0o644)
    path.chmod(0o755)


def test_one_of_an_older_version_is_closed_to_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    open_to_all(tmp_path)
    take(tmp_path)
    assert [mode_of(tmp_path / name) for name in ("objects", "wal", "cache", "lock")] == [0o700, 0o700, 0o700, 0o600]
    assert mode_of(tmp_path) == 0o700
    assert not caplog.messages


@pytest.mark.parametrize("name", ["of-somebody-else", "walter", "cache-of-nginx", "objects.bak", "postgresql"])
def test_a_directory_that_holds_other_things_keeps_its_permissions(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """`--data-dir .` or /srv: what is ours in it is closed, the rest is said."""
    open_to_all(tmp_path)
    (tmp_path / name).touch(mode=0o644)
    take(tmp_path)
    assert mode_of(tmp_path) == 0o755
    assert mode_of(tmp_path / "wal") == 0o700
    assert mode_of(tmp_path / name) == 0o644
    assert caplog.messages == [
        f"data directory {tmp_path} is open to other users: `chmod 700` it unless other users need it"
    ]


def test_the_second_process_is_told_which_one_has_it(tmp_path: Path) -> None:
    first = DataDir(tmp_path)
    first.lock()
    with pytest.raises(DataDirError, match=f"already served by process {os.getpid()}; stop that one first"):
        DataDir(tmp_path).lock()
    first.unlock()
    take(tmp_path)


def refuse(*arguments: object) -> NoReturn:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("call", ["os.pwrite", "os.truncate", "pathlib.Path.chmod"])
def test_a_directory_that_cannot_be_prepared_is_not_left_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The next try in the same process was told that this process serves the directory."""
    open_to_all(tmp_path)
    monkeypatch.setattr(call, refuse)
    with pytest.raises(DataDirError, match="cannot be used: Input/output error"):
        DataDir(tmp_path).lock()
    monkeypatch.undo()
    take(tmp_path)


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_a_directory_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcntl.flock", refuse)
    open_before = open_descriptors()
    with pytest.raises(DataDirError, match="cannot be used: Input/output error"):
        DataDir(tmp_path).lock()
    with pytest.raises(PostgresError, match=r"cannot use .*: Input/output error"):
        EmbeddedPostgres(tmp_path / "postgres")._acquire_lock()
    assert open_descriptors() == open_before
