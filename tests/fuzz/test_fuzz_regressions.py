"""Every input that ever broke something, again: whatever lies in found/ must be answered as it should be.

Inputs under found/open/ are known to break something that is not fixed yet; the test says so when one is fixed.
"""

from pathlib import Path

import pytest

from tests.fuzz.target import FOUND, OPEN, cpu_limit
from tests.fuzz.targets import MODULES, load

SERVICES = ("ingest", "query", "coordinator")


def _inputs(folder: Path, *, services: bool) -> list[Path]:
    paths = sorted(path for path in folder.glob("*-*") if path.is_file())
    return [path for path in paths if (_target_name(path) in SERVICES) == services]


def _target_name(path: Path) -> str:
    return path.name.split("-")[0]


def _replay(path: Path) -> None:
    with cpu_limit():
        load(_target_name(path)).check(path.read_bytes())


@pytest.mark.parametrize("path", _inputs(FOUND, services=False), ids=lambda path: path.name)
def test_what_was_found_in_a_format_stays_fixed(path: Path) -> None:
    _replay(path)


@pytest.mark.usefixtures("cluster")
@pytest.mark.integration
@pytest.mark.parametrize("path", _inputs(FOUND, services=True), ids=lambda path: path.name)
def test_what_was_found_in_a_service_stays_fixed(path: Path) -> None:
    _replay(path)


@pytest.mark.usefixtures("cluster")
@pytest.mark.integration
@pytest.mark.xfail(strict=True, reason="known and open; once fixed, move the input from found/open/ to found/")
@pytest.mark.parametrize("path", _inputs(OPEN, services=True), ids=lambda path: path.name)
def test_what_is_still_open(path: Path) -> None:
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
