"""What the agent needs of its write-ahead log, and how that can fail."""

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
"""OSErrors of a disk that has no room."""

SCARCE = (*NO_SPACE, *NO_DESCRIPTORS)
"""OSErrors of a machine that has no room or no file descriptor for now: the only ones that an agent outlives."""


class WalFull(Exception):
    """No space, or no file descriptor, for the group; nothing of it was kept."""


class WalBroken(Exception):
    """A write or fsync failed in a way that leaves the file's state unknown. Only a restart and replay helps."""


class WalDamaged(Exception):
    """A batch cannot be read back as it was written."""

    def __init__(self, file_name: str, position: WalPosition, reason: str) -> None:
        super().__init__(f"{file_name} at byte {position.at}: {reason}")
        self.file_name = file_name
        self.position = position


class WalFileGone(Exception):
    """The file was deleted since: what it held is registered."""


class WalDirectoryError(Exception):
    """The log's directory cannot be used; the message says which and why."""


class WalLocked(WalDirectoryError):
    """Another process has the directory open."""


class WrongIdentity(WalDirectoryError):
    """The directory belongs to another agent, or a file in it to another log."""


@dataclass(frozen=True, slots=True)
class Frame:
    """A stamped batch on its way to the log."""

    key: RangeKey
    base_offset: int
    record_count: int
    batch: bytes


@dataclass(frozen=True, slots=True)
class Seen:
    """A history of the metadata's events and the last position of it that was heard of; no id: none yet."""

    history_id: str = ""
    position: int = 0


class Wal(Protocol):
    """The appending side. Blocking; all calls come from one thread."""

    @property
    def active(self) -> int | None:
        """The file that is written to, None before the first group."""

    @property
    def active_bytes(self) -> int:
        """Its size, without the space ahead."""

    @property
    def broken(self) -> bool:
        """A call raised WalBroken: what the files hold only a replay can tell."""

    def append(self, frames: Sequence[Frame]) -> list[WalPosition]:
        """Writes the group as a whole, synced if that is the policy. Raises WalFull, WalBroken."""

    def sync(self) -> None:
        """Makes what was written durable. Raises WalBroken."""

    def has_space_for_file(self) -> bool:
        """True if another whole file could be begun now."""

    def delete(self, sequence: int) -> None:
        """Removes a file that is not active. Raises OSError."""

    def mark_settled(self) -> None:
        """The coordinator knows what a replay found: damage in the files before the first append is nothing new to the
        next replay. Raises OSError."""

    def opening_token(self, address: str, drawn: str) -> str:
        """Returns the session's token that a process before this one, at the same address, asked for over what the
        replay found, if nothing was written to the log since; else `drawn`, noted durably. Raises OSError."""

    def mark_used(self) -> None:
        """Binds the log to its agent id for good, durably. Raises OSError."""

    def note_history(self, seen: Seen) -> None:
        """Keeps it beside the log, durably. Raises OSError."""

    def close(self) -> None:
        """Syncs and closes the active file, without the space ahead. Raises WalBroken."""


class BatchReader(Protocol):
    """The reading side. Blocking; calls may come from any thread."""

    def read(self, positions: Sequence[WalPosition]) -> list[bytes]:
        """The batches at `positions`, checked, in their order. Raises WalDamaged, WalFileGone, OSError."""

    def find_damaged(self, positions: Sequence[WalPosition]) -> list[WalPosition]:
        """Those that cannot be read back, as far as possible from the disk itself. Raises WalFileGone, OSError."""


@dataclass(frozen=True, slots=True)
class LogFiles:
    """The files of the open log, and the thread that makes all calls of `wal`, in the order they are asked for: so that
    a deletion never races with a rotation, and no call meets another one half done."""

    wal: Wal
    index: WalIndex
    thread: Executor

    async def run(self, call: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        """Returns what the call returns, made in the log's thread. Raises what it raises."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, call, *arguments)


@dataclass(frozen=True, slots=True)
class OpenedLog:
    """A locked log and what a replay found in it. `unlock` gives it back once `wal` is closed."""

    wal_id: bytes
    replay: Replay
    index: WalIndex
    wal: Wal
    reader: BatchReader
    seen: Seen
    unlock: Callable[[], None]
