"""Directories and files: durable by name, and nobody else's to read. What a power cut leaves of them is tested with
whole services in tests/integration/test_power_cut.py."""

import errno
import os
import stat
from pathlib import Path

import pytest
from shruntime import files

pytestmark = pytest.mark.quick


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The directories that were fsynced, in order."""
    found: list[Path] = []
    sync = files.sync_directory
    monkeypatch.setattr(files, "sync_directory", lambda path: (found.append(path), sync(path)))
    return found


def test_all_missing_directories_are_made_for_this_user_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        files.make_directory(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "a") == mode_of(tmp_path / "a" / "b") == 0o700


@pytest.mark.parametrize("exists", [False, True], ids=["made", "found"])
def test_every_name_on_the_way_is_made_durable_also_of_directories_that_are_there(
    tmp_path: Path, synced: list[Path], exists: bool
) -> None:
    path = tmp_path / "a" / "b"
    if exists:
        path.mkdir(parents=True)
    files.make_directory(path)
    assert synced == [tmp_path / "a", tmp_path, *tmp_path.parents]


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError) as caught:
        files.make_directory(tmp_path / "file" / "x")
    assert caught.value.filename == str(tmp_path / "file")


@pytest.mark.parametrize(("number", "passes"), [(errno.EROFS, True), (errno.EACCES, True), (errno.EIO, False)])
def test_only_a_directory_in_which_nothing_was_made_may_refuse_to_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, passes: bool
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(files, "sync_directory", refuse)
    if passes:
        files.make_directory(tmp_path / "a")
    else:
        with pytest.raises(OSError, match=os.strerror(number)):
            files.make_directory(tmp_path / "a")


def test_a_file_has_its_new_content_or_its_old_one(tmp_path: Path, synced: list[Path]) -> None:
    path = tmp_path / "note"
    files.write_text(path, "a long first one")
    files.write_text(path, "short")
    assert path.read_text() == "short"
    assert mode_of(path) == 0o600
    assert synced == [tmp_path, tmp_path]
    assert [*tmp_path.iterdir()] == [path]


def test_permissions_of_others_are_taken_away_and_no_more(tmp_path: Path) -> None:
    tmp_path.chmod(0o2755)
    assert files.make_private(tmp_path)
    assert mode_of(tmp_path) == 0o2700
    assert files.make_private(tmp_path)
