"""What counts as metadata that went back."""

import pytest
from shcluster.missing_events import MissingEvents

pytestmark = pytest.mark.quick


def test_events_are_missing_when_there_are_fewer_than_were_seen_and_stay_so_until_another_history_begins() -> None:
    missing = MissingEvents()
    assert missing.judge("a", 5, 0, seen=("", 0)) == 0, "nothing was seen yet"
    assert missing.judge("a", 5, 0, seen=("a", 5)) == 0
    assert missing.judge("a", 7, 0, seen=("a", 5)) == 0, "the index may be behind"
    assert missing.judge("a", 6, 0, seen=("a", 7)) == 7
    assert missing.judge("a", 90, 0, seen=("a", 90)) == 7, "others stand in their places"
    assert missing.judge("b", 3, 0, seen=("a", 90)) == 0, "a restore has accounted for them"
    assert missing.judge("b", 3, 0, seen=("b", 3)) == 0


def test_what_coordinators_have_noted_counts() -> None:
    missing = MissingEvents()
    assert missing.judge("a", 50, 12, seen=("a", 50)) == 12
    assert missing.judge("a", 40, 12, seen=("a", 50)) == 50
    assert missing.judge("b", 40, 0, seen=("a", 50)) == 0
