"""Decides if the metadata still contains all that others have seen of its history. Pure.

Terms: a *history* is a sequence of events with an id. A restore begins a new history, which shares the events up to the
backup with the older ones; the newest continues.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from shproto.errors import EventsPruned, MetadataWentBack

from streamhouse_coordinator.core.tables import HistoryRow, PartitionRowKey, RangeRowKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The last event of a history. `missing_position`: position of an event that was seen and is gone; 0: none.
    `pruned_position`: events up to here are not kept."""

    history_id: str
    position: int
    missing_position: int = 0
    pruned_position: int = 0


NOTHING_SEEN = Head(history_id="", position=0)


def check_seen(histories: Sequence[HistoryRow], position: int, seen: Head) -> None:
    """Checks that the metadata continues from `seen`. `histories`: ascending, the last continues. Events seen of an
    older history may be missing: a restore from a backup has accounted for them. Raises MetadataWentBack."""
    if not seen.history_id:
        return
    current = histories[-1].history_id
    if seen.history_id == current and seen.position > position:
        raise went_back(Head(history_id=current, position=position), seen, "it is older than what was seen of it")
    if seen.history_id not in {row.history_id for row in histories}:
        raise went_back(
            Head(history_id=current, position=position), seen, "it does not go on from the history known here"
        )


def check_log(
    head: Head,
    declared: Collection[RangeRowKey],
    granted: Mapping[PartitionRowKey, int],
    known_topic_ids: Collection[str],
) -> None:
    """Checks a log that does not say which history it was written under: its agent is of a version that kept no note,
    or an operator has deleted the note. Raises MetadataWentBack if the log has records of an epoch that was never
    granted here: they would pass for records of a deleted topic, and be dropped.

    `declared`: (topic id, partition, epoch) of the log's ranges. `granted`: by partition, the last epoch.
    `known_topic_ids`: ids of topics that exist or existed.
    """
    for topic_id, partition, epoch in sorted(declared):
        # A known topic without this partition was deleted: its records may be dropped, whatever their epoch.
        known = granted.get((topic_id, partition), 0 if topic_id not in known_topic_ids else epoch)
        if epoch > known:
            raise MetadataWentBack(
                f"the metadata went back or is another one: it stands at event {head.position} of history "
                f"{head.history_id}, and the agent's log has records of epoch {epoch} of topic {topic_id}, partition "
                f"{partition}, which it never granted. The log does not say which history it goes with. Nothing is "
                "done on it. If PostgreSQL was lost, bring the metadata back with `streamhouse restore`",
                history_id=head.history_id,
                position=head.position,
                known_history_id="",
                known_position=0,
            )


def pruned(after_position: int, pruned_position: int) -> EventsPruned:
    """Returns the error for a read of events that were pruned; the remedy is a new snapshot."""
    return EventsPruned(
        f"events up to {pruned_position} are not kept any more, and those after {after_position} are asked for; take a "
        "new snapshot",
        after_position=after_position,
        pruned_position=pruned_position,
    )


def went_back(there: Head, seen: Head, why: str) -> MetadataWentBack:
    """Returns the error for metadata at `there` that lack what was `seen` before. `why`: where that is known from."""
    return MetadataWentBack(
        f"the metadata went back or is another one: it stands at event {there.position} of history {there.history_id}, "
        f"and {seen.position} of {seen.history_id} is known ({why}). Nothing is done on it. If PostgreSQL was lost, "
        "bring the metadata back with `streamhouse restore`",
        history_id=there.history_id,
        position=there.position,
        known_history_id=seen.history_id,
        known_position=seen.position,
    )
