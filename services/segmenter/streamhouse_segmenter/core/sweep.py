"""Orphans among the objects of the store, by age and by the coordinator's answer.

Age alone does not decide: a segment replaced by compaction is old the moment it becomes unreferenced, while readers may
still read it. The coordinator decides, and remembers since when an object is unreferenced.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shproto.v1 import coordinator_pb2


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object of the store: its key and its time of writing."""

    key: str
    size_bytes: int
    modified_ms: int


def old_enough(objects: Iterable[StoredObject], *, now_ms: int, grace_ms: int) -> list[StoredObject]:
    """Returns the objects written at least `grace_ms` ago."""
    return [item for item in objects if now_ms - item.modified_ms >= grace_ms]


@dataclass(frozen=True, slots=True, kw_only=True)
class Orphan:
    """An object without a registered segment. `since_ms`: when that was noticed; `declared_ms` and `worker_id`: its
    upload, 0 and empty unless it was never registered; `deletable`: now, not at a later sweep."""

    key: str
    size_bytes: int
    modified_ms: int
    since_ms: int
    declared_ms: int
    worker_id: str
    deletable: bool

    @property
    def why(self) -> str:
        """Returns how the object became an orphan."""
        if self.declared_ms:
            return f"uploaded by {self.worker_id} and never registered"
        return "no segment lies in it: replaced, removed by retention, of a deleted topic, or never registered"


@dataclass(frozen=True, slots=True)
class JudgedPage:
    """Objects of a page by the coordinator's verdict; the others are part of the log."""

    orphans: list[Orphan]
    declared: int


def judge(page: Sequence[StoredObject], answer: coordinator_pb2.BeginDeletionResponse) -> JudgedPage:
    """Returns the orphans of `page`, and the number of declared uploads. `answer`: about the objects of `page`, in
    order."""
    orphans: list[Orphan] = []
    declared = 0
    for item, deletion in zip(page, answer.objects, strict=True):
        # A verdict about another object would delete this object, so the order of the answer is checked.
        if deletion.object_key != item.key:
            raise ValueError(f"asked about {item.key!r}, the answer is about {deletion.object_key!r}")
        declared += deletion.verdict == coordinator_pb2.DELETION_VERDICT_DECLARED
        begun = deletion.verdict == coordinator_pb2.DELETION_VERDICT_BEGUN
        if begun or deletion.verdict == coordinator_pb2.DELETION_VERDICT_NOTICED:
            orphans.append(
                Orphan(
                    key=item.key,
                    size_bytes=item.size_bytes,
                    modified_ms=item.modified_ms,
                    since_ms=deletion.noticed_ms or answer.now_ms,
                    declared_ms=deletion.declared_ms,
                    worker_id=deletion.worker_id,
                    deletable=begun,
                )
            )
    return JudgedPage(orphans, declared)
