"""Selects the files of the write-ahead log that are not needed any more.

Owns: sizes and end offsets per file. Does not own: the files themselves, registered ends (logs.py).
Invariants: a file is deletable once everything in it is registered, fenced, or lost with the knowledge of the
coordinator. Files are deleted from the front only, so that a file missing in the middle is recognized as damage at the
next start.
"""

from collections.abc import Callable

from shproto.keys import RangeKey


class WalIndex:
    """The size of each file and the highest end offset of each log in that file."""

    def __init__(self) -> None:
        self._ends: dict[int, dict[RangeKey, int]] = {}
        self._sizes: dict[int, int] = {}

    @property
    def size_bytes(self) -> int:
        """Size of all files together."""
        return sum(self._sizes.values())

    def size_of(self, file: int) -> int:
        """Returns the size of the file in bytes, 0 if the file does not exist."""
        return self._sizes.get(file, 0)

    def resize(self, file: int, size_bytes: int) -> None:
        """Sets the size of the file; adds a file that is new."""
        self._sizes[file] = size_bytes
        self._ends.setdefault(file, {})

    def note(self, file: int, key: RangeKey, end_offset: int) -> None:
        """Notes that the file holds a batch of log `key` that ends at `end_offset`."""
        ends = self._ends.setdefault(file, {})
        if end_offset > ends.get(key, -1):
            ends[key] = end_offset

    def deletable(self, registered_end: Callable[[RangeKey], int | None], active: int | None) -> list[int]:
        """Returns the files that may be deleted, oldest first; stops at the file `active`, which is being written.

        `registered_end` returns None for a log that is not held any more.
        """
        files = []
        for file in sorted(self._ends):
            # Stops at the first file still needed: a file missing between two others would be read as damage at the
            # next start.
            if file == active or not all(_covered(registered_end(key), end) for key, end in self._ends[file].items()):
                break
            files.append(file)
        return files

    def all_covered(self, registered_end: Callable[[RangeKey], int | None]) -> bool:
        """True if no file holds records that are still needed."""
        return len(self.deletable(registered_end, None)) == len(self._ends)

    def remove(self, file: int) -> None:
        """Forgets a file that has been deleted."""
        del self._ends[file]
        del self._sizes[file]


def _covered(registered_end: int | None, end_offset: int) -> bool:
    return registered_end is None or end_offset <= registered_end
