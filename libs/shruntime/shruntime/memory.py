"""Memory: the limit of this process, defaults of settings that follow it, and giving freed memory back.

A fixed default that suits a server kills a container of 512 MiB: the kernel ends the process that exceeds its control
group's limit, without a word. Budgets are therefore shares of the limit, between bounds.
"""

import ctypes
import gc
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

log = logging.getLogger(__name__)

MIB = 1024 * 1024
LIMIT_SETTING = "memory_limit_bytes"
_CGROUPS = Path("sys/fs/cgroup")

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_MMAP_FROM_BYTES = MIB
_TRIM_FROM_BYTES = 8 * MIB
_ARENAS_MAX = 4


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """A limit in bytes. `source`: the file it was read from: /proc/meminfo, or a control group's."""

    size_bytes: int
    source: str


def memory_limit(root: Path = Path("/")) -> MemoryLimit:
    """Returns the memory of this machine, or the smallest limit of this process's control groups, if that is less.
    `root`: parent of /proc and /sys."""
    limits = [_machine_limit(root), *_cgroup_limits(root)]
    return min(limits, key=lambda limit: limit.size_bytes)


def _machine_limit(root: Path) -> MemoryLimit:
    # Not sysconf alone: in system containers /proc/meminfo has the container's share.
    for line in _lines(root / "proc/meminfo"):
        name, _, value = line.partition(":")
        if name == "MemTotal":
            return MemoryLimit(int(value.split()[0]) * 1024, "/proc/meminfo")
    return MemoryLimit(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "sysconf")


def _cgroup_limits(root: Path) -> Iterator[MemoryLimit]:
    """Yields the limits of all groups from this process's up to the root, as each of them counts. In a container the
    path may be the host's, and missing: then the root is the container's own group."""
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:  # version 2; in a hybrid set-up without the files of this controller
            top, names = root / _CGROUPS, ["memory.max", "memory.high"]
        elif "memory" in controllers.split(","):
            top, names = root / _CGROUPS / "memory", ["memory.limit_in_bytes"]
        else:
            continue
        # A process outside of its namespace's root has a path with `..`, which must not lead out of the mount.
        group = top.joinpath(*(part for part in path.strip().split("/") if part != ".."))
        for level in (group, *group.parents):
            if not level.is_relative_to(top):
                break
            for name in names:
                if (size_bytes := _number(level / name)) is not None:
                    yield MemoryLimit(size_bytes, f"/{(level / name).relative_to(root)}")


def _number(path: Path) -> int | None:
    """Returns the number in the file; None without the file or without a limit ("max", or 0, in which nothing could
    run)."""
    text = "".join(_lines(path)).strip()
    return (int(text) or None) if text.isdecimal() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryShare:
    """Default of a setting: 1/part of the memory limit, from `least` to `most`. `unit`: bytes per unit of the
    setting; the value is in these units."""

    part: int
    least: int
    most: int
    unit: int = 1

    def __call__(self, values: Mapping[str, Any]) -> int:
        """Returns the default, computed from the settings before it, the limit among them."""
        limit_bytes = values.get(LIMIT_SETTING) or memory_limit().size_bytes
        return max(self.least, min(self.most, limit_bytes // self.part // self.unit))


def log_memory_limits(*settings: BaseModel, root: Path = Path("/")) -> None:
    """Logs the memory limit of these settings, its source, and the limits that are shares of it."""
    given_bytes = getattr(settings[0], LIMIT_SETTING)
    limit = MemoryLimit(given_bytes, LIMIT_SETTING) if given_bytes else memory_limit(root)
    parts = dict.fromkeys(part for one in settings for part in _shares(one))  # services share some
    log.info(
        "memory: %s (%s), of which %s", _in_mib(limit.size_bytes), limit.source, ", ".join(parts) or "none by size"
    )


def _shares(settings: BaseModel) -> Iterator[str]:
    for name, field in type(settings).model_fields.items():
        if isinstance(field.default_factory, MemoryShare):
            value = getattr(settings, name)
            yield f"{name} {_in_mib(value) if 'bytes' in name else value}"


def _in_mib(size_bytes: int) -> str:
    return f"{size_bytes / MIB:.0f} MiB" if size_bytes >= MIB else f"{size_bytes} bytes"


def give_back_freed_memory() -> bool:
    """Makes the C library return freed blocks of 1 MiB and more to the system at once.

    Returns False if it is not glibc, or if variables of the environment configure its allocator.

    By default glibc raises that threshold to 32 MiB as such blocks are freed. Batches of 12 MB then come from heaps
    that never shrink: 300 MiB of `serve` stayed taken when all was idle again (now 110), 480 at the peak (now 280).
    """
    variables = ("MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
    if sys.platform != "linux" or any(os.environ.get(name) for name in variables):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl
        return False
    mallopt(_M_MMAP_THRESHOLD, _MMAP_FROM_BYTES)
    # Setting one threshold stops the other from following it: the 128 KiB it begins with would ask the kernel at every
    # small batch.
    mallopt(_M_TRIM_THRESHOLD, _TRIM_FROM_BYTES)
    # Each of some 40 threads that come and go may otherwise leave free blocks in one of 8 heaps per core.
    return bool(mallopt(_M_ARENA_MAX, _ARENAS_MAX))


def spare_loaded_code() -> None:
    """Excludes all loaded objects from garbage collection: modules, classes and functions live as long as the process.

    With them each collection of the oldest generation stopped `serve` for 70 ms, now and then.
    """
    gc.collect()
    gc.freeze()
