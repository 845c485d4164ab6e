"""How many records a reader has still to read: records, not the distance of offsets."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lag:
    """`records` still to be read. Not `exact`: older epochs' gaps lie in between, and it is an upper bound."""

    records: int
    exact: bool


def lag_of(position: int, log_start: int, end: int, newest_start: int, newest_registered_end: int, stored: int) -> Lag:
    """From `position` to the acknowledged `end` of a partition.

    newest_start: first offset of the newest epoch's range, which has no gaps inside; newest_registered_end: up to
    where its records are stored; stored: records in segments from log_start on, of all epochs.
    """
    position = max(position, log_start)
    distance = max(0, end - position)
    if position >= newest_start or newest_start <= log_start:
        return Lag(distance, True)
    # Everything stored, and the newest range's records that are not; older unregistered ones are not known of.
    bound = stored + max(0, end - max(newest_registered_end, newest_start))
    return Lag(min(distance, bound), False)


def lag_behind(position: int, end: int, newest_start: int, older_records: int, older_exact: bool) -> Lag:
    """The same where the coordinator has counted: older_records lie from `position` on in the epochs before the
    newest one. Not older_exact: one of these may hold more than is registered, so this is a lower bound."""
    return Lag(max(0, end - max(position, newest_start)) + older_records, older_exact)
