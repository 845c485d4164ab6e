"""What a run prints: its own lines, and nothing that its clients log."""

import logging
import warnings
from pathlib import Path

import pytest

from tests.faults.progress import clients_log, line

pytestmark = pytest.mark.quick


def test_a_line_says_where_a_run_is() -> None:
    counts = {"Produce": 120, "Produced": 117, "Polled": 9}
    assert line(None, set(), {}) == "starting; no fault at work; 0 operations, 0 acknowledged"
    assert line(125.9, {"pause", "kill"}, counts) == "2:05 left; kill, pause at work; 120 operations, 117 acknowledged"
    assert line(-1, set(), counts).startswith("healed, coming to rest; no fault at work; 120 operations")


def test_what_clients_log_is_kept_and_not_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "clients.log"
    with clients_log(path):
        logging.getLogger("streamhouse.reader").warning("reading failed")
        with warnings.catch_warnings():
            warnings.simplefilter("always")  # here they are errors
            warnings.warn("an old way", DeprecationWarning, stacklevel=1)
    logging.getLogger("streamhouse.reader").debug("after it")
    text = path.read_text()
    assert "WARNING streamhouse.reader: reading failed" in text and "an old way" in text and "after it" not in text
    assert capfd.readouterr() == ("", "")


def test_nothing_logged_leaves_no_file(tmp_path: Path) -> None:
    with clients_log(tmp_path / "clients.log"):
        pass
    assert not (tmp_path / "clients.log").exists()
