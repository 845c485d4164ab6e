"""Which files of the write-ahead log are not needed any more.

A file may go once everything in it is registered (or given up for a reason the coordinator knows). Files go from
the front only, so that a file missing in the middle is seen as damage at the next start.
"""

from collections.abc import Callable

from shproto.keys import RangeKey


class WalIndex:
    """Per file the highest end offset of each log in it, and its size."""

    def __init__(self) -> None:
        self._ends: dict[int, dict[RangeKey, int]] = {}
        self._sizes: dict[int, int] = {}

    @property
    def size_bytes(self) -> int:
        """Of all files together."""
        return sum(self._sizes.values())

    def size_of(self, file: int) -> int:
        """0 when there is no such file."""
        return self._sizes.get(file, 0)

    def resize(self, file: int, size_bytes: int) -> None:
        """The file exists and is this large."""
        self._sizes[file] = size_bytes
        self._ends.setdefault(file, {})

    def note(self, file: int, key: RangeKey, end_offset: int) -> None:
        """The file holds a batch of this log that ends at `end_offset`."""
        ends = self._ends.setdefault(file, {})
        if end_offset > ends.get(key, -1):
            ends[key] = end_offset

    def deletable(self, registered_end: Callable[[RangeKey], int | None], active: int | None) -> list[int]:
        """The files to delete, oldest first. `registered_end` gives None for a log that nobody needs; `active` is
        being written."""
        files = []
        for file in sorted(self._ends):
            if file == active or not all(_covered(registered_end(key), end) for key, end in self._ends[file].items()):
                break
            files.append(file)
        return files

    def all_covered(self, registered_end: Callable[[RangeKey], int | None]) -> bool:
        """Nothing in any file is needed any more."""
        return len(self.deletable(registered_end, None)) == len(self._ends)

    def remove(self, file: int) -> None:
        del self._ends[file]
        del self._sizes[file]


def _covered(registered_end: int | None, end_offset: int) -> bool:
    return registered_end is None or end_offset <= registered_end
