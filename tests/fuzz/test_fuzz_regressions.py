"""Every input that ever broke something, again: whatever lies in found/ must be answered as it should be."""

from pathlib import Path

import pytest

from tests.fuzz.target import FOUND, cpu_limit
from tests.fuzz.targets import MODULES, load


def _inputs(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*-*") if path.is_file())


def _target_name(path: Path) -> str:
    return path.name.split("-")[0]


def _replay(path: Path) -> None:
    with cpu_limit():
        load(_target_name(path)).check(path.read_bytes())


@pytest.mark.usefixtures("cluster")
@pytest.mark.integration
@pytest.mark.parametrize("path", _inputs(FOUND), ids=lambda path: path.name)
def test_what_was_found_stays_fixed(path: Path) -> None:
    _replay(path)


def test_every_input_names_its_target() -> None:
    names = {_target_name(path) for path in FOUND.rglob("*-*") if path.is_file()}
    assert names <= set(MODULES), f"no such targets: {names - set(MODULES)}"


def test_an_input_that_breaks_a_target_fails_its_replay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: object) -> None:
        raise IndexError("as a decoder with a bug would")

    monkeypatch.setattr("tests.fuzz.formats.validate_batch", broken)
    path = tmp_path / "batch-indexerror"
    path.write_bytes(load("batch").seeds()[0])
    with pytest.raises(IndexError):
        _replay(path)
