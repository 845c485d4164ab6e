"""ARCHITECTURE.md names modules that exist, and stays short enough to be read at once."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "ARCHITECTURE.md").read_text()
LINES_MAX = 150
ROWS = re.findall(r"^\| ([^|]+) \| ((?:`[^`]+`[:,; ]*)+) \|$", PAGE, re.MULTILINE)


def test_the_table_of_steps_is_found() -> None:
    assert len(ROWS) >= 15


@pytest.mark.parametrize(("step", "where"), ROWS, ids=[step for step, _ in ROWS])
def test_the_modules_of_a_step_exist(step: str, where: str) -> None:
    """Names before a colon are folders; the names behind it lie in the package of that folder."""
    folder = ""
    for name, colon in re.findall(r"`([^`]+)`(:?)", where):
        if colon:
            folder = name
            assert (ROOT / folder).is_dir(), f"{step}: no folder {folder}"
        else:
            assert list((ROOT / folder).glob(f"*/{name}")), f"{step}: no module {name} in the package of {folder}"


def test_the_page_is_read_in_ten_minutes() -> None:
    assert PAGE.count("\n") <= LINES_MAX
