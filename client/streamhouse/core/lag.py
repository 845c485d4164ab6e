"""Number of records that a reader still has to read: records, not the distance of offsets."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lag:
    """`records` still to be read. exact False: gaps of older epochs lie in between, and the number is an upper
    bound."""

    records: int
    exact: bool


def lag_of(position: int, log_start: int, end: int, newest_start: int, newest_registered_end: int, stored: int) -> Lag:
    """Returns the lag from `position` to the acknowledged `end` of a partition.

    newest_start: first offset of the newest epoch's range, which has no gaps inside. newest_registered_end: end of its
    stored records. stored: records in segments from log_start on, of all epochs.
    """
    position = max(position, log_start)
    distance = max(0, end - position)
    if position >= newest_start or newest_start <= log_start:
        return Lag(distance, True)
    # All stored records, and the records of the newest range that are not stored yet. Unregistered records of older
    # ranges are not known.
    bound = stored + max(0, end - max(newest_registered_end, newest_start))
    return Lag(min(distance, bound), False)


def lag_behind(position: int, end: int, newest_start: int, older_records: int, older_exact: bool) -> Lag:
    """Returns the lag where the coordinator has counted records: older_records lie from `position` on in the epochs
    before the newest. older_exact False: an older epoch may hold unregistered records, and the number is a lower
    bound."""
    return Lag(max(0, end - max(position, newest_start)) + older_records, older_exact)
