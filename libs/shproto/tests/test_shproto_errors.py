"""docs/errors.md lists every error with the status and retriability it really has."""

import re
from pathlib import Path

from shproto.errors import StreamHouseError

PAGE = Path(__file__).resolve().parents[3] / "docs" / "errors.md"


def test_the_page_lists_every_error() -> None:
    rows = re.findall(r"^\| ([A-Z_]+) \| ([A-Z_]+) \| (yes|no) \|", PAGE.read_text(), re.M)
    documented = {reason: (status, retriable == "yes") for reason, status, retriable in rows}
    actual = {reason: (cls.status.name, cls.retriable) for reason, cls in StreamHouseError.registry.items()}
    assert documented == actual


def test_round_trip_keeps_class_and_numbers() -> None:
    for cls in StreamHouseError.registry.values():
        error = StreamHouseError.from_detail(cls("what happened", retry_after_ms=3, limit=5).to_detail())
        assert type(error) is cls
        assert (error.message, error.retry_after_ms, error.details) == ("what happened", 3, {"limit": "5"})
