"""Which objects are orphans: old enough, referenced by no segment, and so in two looks some time apart.

Age alone does not do: a segment that was compacted away is old the moment it becomes unreferenced, while readers
may still be at it. The second look covers them, and any clock that runs ahead.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object of the store: its key and when it was written."""

    key: str
    size_bytes: int
    modified_ms: int


def old_enough(objects: Iterable[StoredObject], *, now_ms: int, grace_ms: int) -> list[StoredObject]:
    """Those written at least `grace_ms` ago."""
    return [item for item in objects if now_ms - item.modified_ms >= grace_ms]


def may_register(upload_age_ms: int, grace_ms: int) -> bool:
    """Whether an object whose upload began so long ago is safe from any sweep, so that a segment may refer to it."""
    return upload_age_ms < grace_ms // 2


@dataclass(frozen=True, slots=True)
class Verdict:
    """`delete` now; remember `suspects` (key -> when it was first seen unreferenced) until the next look."""

    delete: tuple[StoredObject, ...]
    suspects: dict[str, int]


def judge(
    unreferenced: Iterable[StoredObject], suspects: Mapping[str, int], *, now_ms: int, confirm_ms: int
) -> Verdict:
    """What to do about the objects seen unreferenced now, given those of the looks before.

    `now_ms` is on the same monotonic clock as the times in `suspects`. An object that is referenced again
    (a slow registration made it) is no suspect any more.
    """
    delete: list[StoredObject] = []
    kept: dict[str, int] = {}
    for item in unreferenced:
        seen_ms = suspects.get(item.key, now_ms)
        if now_ms - seen_ms >= confirm_ms:
            delete.append(item)
        else:
            kept[item.key] = seen_ms
    return Verdict(tuple(delete), kept)
