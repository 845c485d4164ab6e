"""What a fuzz target is, and when an input counts as a finding."""

from __future__ import annotations

import hashlib
import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import FrameType

ROOT = Path(__file__).resolve().parents[2]
FOUND = Path(__file__).parent / "found"
# Found, reported and not fixed yet.
OPEN = FOUND / "open"
GOLDEN = ROOT / "libs" / "shformat" / "tests" / "golden"

# CPU time, not wall time: a busy machine is no finding. An input of 64 KiB takes milliseconds.
CPU_SECONDS_MAX = 5.0


class Finding(AssertionError):
    """The code under test answered, but not what it promises."""


class Hang(BaseException):
    """An input took longer than CPU_SECONDS_MAX. Not an Exception, so that no handler under test takes it."""


def _nothing() -> None:
    """For targets that need neither preparation nor an end."""


@dataclass(frozen=True)
class Target:
    """One decoder or service. `check` raises for a finding; `mutate` knows the structure of an input, `repair` makes
    checksums fit again after any other change; `prepare` and `close` start and end what inputs are given to."""

    name: str
    check: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    mutate: Callable[[bytes, Random], bytes]
    repair: Callable[[bytes], bytes] = bytes
    size_bytes_max: int = 64 * 1024
    # What one input may make the process grow by; the limits given to the decoders allow less than half of it.
    memory_bytes_max: int = 256 * 1024 * 1024
    prepare: Callable[[], None] = _nothing
    close: Callable[[], None] = _nothing


def ensure(condition: object, what: str) -> None:
    """Raises Finding unless `condition`."""
    if not condition:
        raise Finding(what)


@contextmanager
def cpu_limit(seconds: float = CPU_SECONDS_MAX) -> Iterator[None]:
    """Raises Hang in the main thread when the block uses more CPU time."""

    def ring(_signal: int, _frame: FrameType | None) -> None:
        raise Hang(f"more than {seconds} s of CPU time")

    before = signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def limit_memory(grow_bytes_max: int) -> None:
    """From here on an allocation that makes this process larger by more than that is a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + grow_bytes_max
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def signature(error: BaseException) -> str:
    """Equal for findings with one cause: the kind of error, and the line of ours it came from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if str(ROOT) in frame.filename]
    ours = [frame for frame in frames if ".venv" not in frame.filename and frame.name != ensure.__name__]
    place = f"{Path(ours[-1].filename).stem}-{ours[-1].name}" if ours else "unknown"
    said = str(error) if isinstance(error, Finding) else ""
    digest = hashlib.sha256(f"{type(error).__name__} {place} {said[:40]}".encode()).hexdigest()[:8]
    return f"{type(error).__name__.lower()}-{place}-{digest}"
