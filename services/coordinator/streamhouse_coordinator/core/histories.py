"""Which history of the events this is, and whether what others have seen of it is still there."""

from collections.abc import Sequence
from dataclasses import dataclass

from shproto.errors import MetadataWentBack

from streamhouse_coordinator.core.tables import HistoryRow


@dataclass(frozen=True, slots=True)
class Head:
    """The last event of a history."""

    history_id: str
    position: int


NOTHING_SEEN = Head("", 0)


def check_seen(histories: Sequence[HistoryRow], position: int, seen: Head) -> None:
    """Raises MetadataWentBack unless the metadata goes on from what was `seen`. `histories`: ascending, the last one
    goes on. What was seen of an older one may be missing here: a restore from a backup has accounted for it."""
    if not seen.history_id:
        return
    current = histories[-1].history_id
    if seen.history_id == current and seen.position > position:
        raise went_back(Head(current, position), seen, "it is older than what was seen of it")
    if seen.history_id not in {row.history_id for row in histories}:
        raise went_back(Head(current, position), seen, "it does not go on from the history known here")


def went_back(there: Head, seen: Head, why: str) -> MetadataWentBack:
    return MetadataWentBack(
        f"the metadata went back or is another one: it stands at event {there.position} of history {there.history_id}, "
        f"and {seen.position} of {seen.history_id} is known ({why}). Nothing is done on it. If PostgreSQL was lost, "
        "bring the metadata back with `streamhouse restore`",
        history_id=there.history_id,
        position=there.position,
        known_history_id=seen.history_id,
        known_position=seen.position,
    )
