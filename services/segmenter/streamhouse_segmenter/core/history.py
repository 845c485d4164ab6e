"""Detects that the metadata went back in time: PostgreSQL restored from a backup.

Segments registered after that backup look unreferenced then, and deleting them would lose acknowledged records. A mark
in the object store names an event; if the feed no longer has that very event at that position, its history is another,
and nothing may be deleted. The coordinator keeps the identity of a marked event even after pruning the event.
"""

import json
import zlib
from dataclasses import asdict, dataclass, replace

from shproto.v1 import coordinator_pb2

MARK_KEY = "control/history-mark.json"
# Objects that a restore of the metadata left out (damaged objects, segments behind a hole) stay for a week: time to
# look at the report, and to restore once more.
RESTORE_GRACE_MS = 7 * 24 * 3_600_000
_CHECKSUM = "crc32"


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryMark:
    """An event of the control plane, by the fields that identify it.

    Nothing is deleted before `sweep_from_ms` (since 1970), which a restore of the metadata sets and which goes from
    mark to mark.
    """

    position: int
    stream_id: str
    version: int
    type: str
    created_ms: int
    sweep_from_ms: int = 0

    @classmethod
    def of(cls, event: coordinator_pb2.Event) -> "HistoryMark":
        """Returns the mark that names this event."""
        return cls(
            position=event.position,
            stream_id=event.stream_id,
            version=event.version,
            type=event.type,
            created_ms=event.created_ms,
        )

    def describe(self) -> str:
        """Returns the event as text for people, without the position."""
        return f"{self.type} of {self.stream_id}, {self.created_ms} ms after 1970"

    def encode(self) -> bytes:
        """Returns the bytes that docs/formats/history-mark.md describes."""
        return json.dumps(asdict(self) | {_CHECKSUM: self._checksum()}).encode()

    def _checksum(self) -> int:
        return zlib.crc32(json.dumps(asdict(self)).encode())

    @classmethod
    def decode(cls, body: bytes) -> tuple["HistoryMark", bool]:
        """Returns the mark, and False if it has no checksum, as marks of older versions.

        Raises ValueError for anything else, and for a damaged mark.
        """
        fields = json.loads(body)
        if not isinstance(fields, dict):
            raise ValueError("not a history mark: no JSON object")
        checksum = fields.pop(_CHECKSUM, None)
        try:
            mark = cls(**fields)
        except TypeError as error:
            raise ValueError(f"not a history mark: {error}") from error
        numbers = {name: getattr(mark, name) for name in ("position", "version", "created_ms", "sweep_from_ms")}
        if wrong := [name for name, number in numbers.items() if not isinstance(number, int)]:
            raise ValueError(f"not a history mark: {wrong[0]} is not a whole number")
        if checksum not in (None, mark._checksum()):
            raise ValueError(f"its checksum is {checksum!r}, that of its content {mark._checksum()}")
        return mark, checksum is not None


NO_MARK = HistoryMark(position=0, stream_id="", version=0, type="", created_ms=0)


def went_back(mark: HistoryMark, current: HistoryMark | None, head: coordinator_pb2.GetHeadResponse) -> str:
    """Returns why the feed is not the feed that `mark` was taken from, or an empty text. `current`: the event there
    now; `head`: the end of the feed."""
    # All fields: positions and versions are used again by other events after a rollback.
    if current == replace(mark, sweep_from_ms=0):
        return ""
    there = "is not there" if current is None else f"is another one there ({current.describe()})"
    if current is None and mark.position <= head.pruned_position:
        there = "was not marked in this history, which keeps no events of that age any more"
    return (
        f"the store has seen event {mark.position} ({mark.describe()}), which {there}:"
        f" PostgreSQL stands at event {head.events_position} of history {head.history_id}"
    )
