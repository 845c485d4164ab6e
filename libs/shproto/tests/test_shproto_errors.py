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


def test_what_is_echoed_is_cut_so_that_it_travels() -> None:
    """gRPC peers refuse trailing metadata beyond about 8 KiB; the reason must arrive whatever the caller sent."""
    error = StreamHouseError("ü" * 100_000, **dict.fromkeys(("topic", "value"), "語" * 100000))
    size_bytes = len(error.to_detail().SerializeToString()) + 3 * len(error.message.encode())
    assert size_bytes < 8192
    assert error.message.endswith("… (100000 characters)")
