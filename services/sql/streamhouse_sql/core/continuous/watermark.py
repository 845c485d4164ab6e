"""Watermarks: how far event time has come.

Owns: a watermark per source and partition, and the task's. Does not own: event times of rows,
which partitions are idle.
Invariants: no watermark goes back. The task's watermark is at most the least of the partitions that were not idle when
it last moved; while all are idle, it stays. All times are microseconds since 1970.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

Partition = tuple[str, int]


class Watermarks:
    """Watermarks of the sources that have one. `partitions`: number of partitions by source."""

    def __init__(self, partitions: Mapping[str, int]) -> None:
        self._of: dict[Partition, int | None] = {
            (source, number): None for source, count in partitions.items() for number in range(count)
        }
        self._value: int | None = None

    @property
    def value(self) -> int | None:
        """The task's watermark: rows with earlier event times are late. None: there is none yet."""
        return self._value

    def advanced(self, seen: Mapping[Partition, int], idle: Collection[Partition]) -> Watermarks:
        """Returns the watermarks after a micro-batch; these stay as they are, for a micro-batch that fails.

        `seen`: the largest watermark that the micro-batch's rows gave each partition. `idle`: partitions that hold
        nothing back in this micro-batch. A partition that has had no row yet holds back everything until it is idle.
        """
        after = Watermarks({})
        after._of = dict(self._of)
        for partition, value in seen.items():
            before = after._of.get(partition)
            after._of[partition] = value if before is None else max(before, value)
        # A set of its own: a look-up in a list for each partition would be quadratic.
        resting = set(idle)
        holding = [value for partition, value in after._of.items() if partition not in resting]
        known = [value for value in holding if value is not None]
        after._value = self._value
        if holding and len(known) == len(holding):
            least = min(known)
            after._value = least if self._value is None else max(self._value, least)
        return after

    def rows(self) -> list[tuple[str, int, int | None]]:
        """Returns (source, partition, watermark) of all partitions, in order, and the task's own as ("", -1, …)."""
        return [
            ("", -1, self._value),
            *((source, number, value) for (source, number), value in sorted(self._of.items())),
        ]

    def restored(self, rows: Collection[tuple[str, int, int | None]]) -> Watermarks:
        """Returns the watermarks that `rows` gave; partitions that came since hold back as those without a row do.
        Raises ValueError for a source that is not known here."""
        restored = Watermarks({})
        restored._of = dict(self._of)
        known = {source for source, _ in self._of}
        for source, number, value in rows:
            if number >= 0 and source not in known:
                raise ValueError(f"there is no source {source!r} with a watermark")
            if number < 0:
                restored._value = value
            else:
                restored._of[source, number] = value
        return restored


def crossed(before: int | None, after: int | None, step_us: int, offset_us: int) -> bool:
    """True if the watermark passed or reached a multiple of the step (plus the offset) that it had not reached."""
    if after is None:
        return False
    return before is None or (after - offset_us) // step_us > (before - offset_us) // step_us
