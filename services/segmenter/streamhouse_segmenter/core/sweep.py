"""Objects of the store that may be orphans, and what the coordinator says of them.

Age alone does not do: a segment that was compacted away is old the moment it becomes unreferenced, while readers
may still be at it. The coordinator decides, and remembers since when nothing refers to an object.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shproto.v1 import coordinator_pb2


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object of the store: its key and when it was written."""

    key: str
    size_bytes: int
    modified_ms: int


def old_enough(objects: Iterable[StoredObject], *, now_ms: int, grace_ms: int) -> list[StoredObject]:
    """Those written at least `grace_ms` ago."""
    return [item for item in objects if now_ms - item.modified_ms >= grace_ms]


@dataclass(frozen=True, slots=True)
class Orphan:
    """An object that no segment lies in. `since_ms`: when that was noticed; `declared_ms` and `worker_id`: its upload,
    0 and empty unless it never got to be registered; `deletable`: now, not at a later sweep."""

    key: str
    size_bytes: int
    modified_ms: int
    since_ms: int
    declared_ms: int
    worker_id: str
    deletable: bool

    @property
    def why(self) -> str:
        """How it came to be one."""
        if self.declared_ms:
            return f"uploaded by {self.worker_id} and never registered"
        return "no segment lies in it: replaced, removed by retention, of a deleted topic, or never registered"


@dataclass(frozen=True, slots=True)
class Judged:
    """Objects of one page by what the coordinator said of them; the others are part of the log."""

    orphans: list[Orphan]
    declared: int


def judge(page: Sequence[StoredObject], answer: coordinator_pb2.BeginDeletionResponse) -> Judged:
    """`answer`: about the objects of `page`, in the same order."""
    orphans: list[Orphan] = []
    declared = 0
    for item, said in zip(page, answer.objects, strict=True):
        if said.object_key != item.key:
            raise ValueError(f"asked about {item.key!r}, the answer is about {said.object_key!r}")
        declared += said.verdict == coordinator_pb2.DELETION_VERDICT_DECLARED
        begun = said.verdict == coordinator_pb2.DELETION_VERDICT_BEGUN
        if begun or said.verdict == coordinator_pb2.DELETION_VERDICT_NOTICED:
            since_ms = said.noticed_ms or answer.now_ms
            orphans.append(
                Orphan(
                    item.key, item.size_bytes, item.modified_ms, since_ms, said.declared_ms, said.worker_id, begun
                )
            )  # fmt: skip
    return Judged(orphans, declared)
