"""Ports to the write-ahead log: the operations the agent needs, and the errors they raise."""

import asyncio
import errno
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Protocol, TypeVar, TypeVarTuple

from shproto.keys import RangeKey
from shruntime.descriptors import NO_DESCRIPTORS

from streamhouse_ingest.log.buffer import WalPosition
from streamhouse_ingest.log.replay import Replay
from streamhouse_ingest.log.wal_index import WalIndex

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of an OSError for a disk without room."""

SCARCE = (*NO_SPACE, *NO_DESCRIPTORS)
"""Error numbers of an OSError for a lack of disk space or file descriptors, which may pass: the agent survives only
these."""


class WalFull(Exception):
    """No space, or no file descriptor, for the group; nothing of the group was kept."""


class WalBroken(Exception):
    """A write or fsync failed in a way that leaves the file's state unknown. Only a restart and replay helps."""


class WalDamaged(Exception):
    """A batch cannot be read back as it was written."""

    def __init__(self, file_name: str, position: WalPosition, reason: str) -> None:
        super().__init__(f"{file_name} at byte {position.at}: {reason}")
        self.file_name = file_name
        self.position = position


class WalFileGone(Exception):
    """The file was deleted meanwhile: its records are registered."""


class WalDirectoryError(Exception):
    """The directory of the log cannot be used; the message names the directory and the reason."""


class WalLocked(WalDirectoryError):
    """Another process has the directory open."""


class WrongIdentity(WalDirectoryError):
    """The directory belongs to another agent, or a file in it to another log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A stamped batch on its way to the log."""

    key: RangeKey
    base_offset: int
    record_count: int
    batch: bytes


@dataclass(frozen=True, slots=True)
class Seen:
    """A metadata history and the last position seen in it; no id before the first session."""

    history_id: str = ""
    position: int = 0


class Wal(Protocol):
    """Appending side of the log. Blocking; all calls come from a single thread."""

    @property
    def active(self) -> int | None:
        """Sequence number of the file that is written to, None if no file is open."""

    @property
    def active_bytes(self) -> int:
        """Size of the active file, without the space ahead."""

    @property
    def broken(self) -> bool:
        """True if a call raised WalBroken: only a replay can find the content of the files."""

    def append(self, frames: Sequence[Frame]) -> list[WalPosition]:
        """Writes the group as a whole, synced if that is the policy, and returns the position of each batch, in order.
        Raises WalFull, WalBroken."""

    def sync(self) -> None:
        """Makes all groups written so far durable. Raises WalBroken."""

    def has_space_for_file(self) -> bool:
        """True if the disk has room for another file of full size now."""

    def delete(self, sequence: int) -> None:
        """Removes a file that is not active. Raises OSError."""

    def mark_settled(self) -> None:
        """Notes that the findings of the replay have been reported to the coordinator: the next replay treats damage in
        files from before the first append as known. Raises OSError."""

    def opening_token(self, address: str, drawn: str) -> str:
        """Returns the session token that an earlier process at `address` noted for the same findings of a replay, if
        nothing was written to the log since; otherwise notes `drawn` durably and returns it. Raises OSError."""

    def mark_used(self) -> None:
        """Binds the log to its agent id for good, durably. Raises OSError."""

    def note_history(self, seen: Seen) -> None:
        """Stores the metadata history and the position seen in it beside the log, durably. Raises OSError."""

    def close(self) -> None:
        """Syncs the active file, cuts off the space ahead and closes the file. Raises WalBroken, OSError."""


class BatchReader(Protocol):
    """Reading side of the log. Blocking; calls may come from any thread."""

    def read(self, positions: Sequence[WalPosition]) -> list[bytes]:
        """Returns the batches at `positions`, checked, in the same order. Raises WalDamaged, WalFileGone, OSError."""

    def find_damaged(self, positions: Sequence[WalPosition]) -> list[WalPosition]:
        """Returns the positions whose batches cannot be read back, as far as possible from the disk instead of the page
        cache. Raises WalFileGone, OSError."""


@dataclass(frozen=True, slots=True)
class LogFiles:
    """The files of the open log, and the thread that makes all calls of `wal`, in the order of the requests. A deletion
    therefore never races with a rotation, and no call runs in the middle of another."""

    wal: Wal
    index: WalIndex
    thread: Executor

    async def run(self, call: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        """Makes the call in the log's thread. Returns its result or raises its error."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, call, *arguments)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedLog:
    """A locked log and the findings of its replay. The owner calls `unlock` once `wal` is closed."""

    wal_id: bytes
    replay: Replay
    index: WalIndex
    wal: Wal
    reader: BatchReader
    seen: Seen
    unlock: Callable[[], None]
