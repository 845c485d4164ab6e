"""The memory limit out of files as kernels write them, and defaults that follow it."""

import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field
from shruntime.memory import MIB, MemoryShare, log_memory_limits, memory_limit
from shruntime.settings import CommonSettings

MACHINE = "MemTotal:        8388608 kB\nMemFree:         1048576 kB\n"  # 8 GiB
V1_NO_LIMIT = "9223372036854771712\n"


def kernel(root: Path, files: Mapping[str, str], cgroup: str) -> Path:
    """A /proc and /sys below `root`."""
    for name, content in {"proc/meminfo": MACHINE, "proc/self/cgroup": cgroup, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "mib", "source"),
    [
        pytest.param("", {}, 8192, "/proc/meminfo", id="no groups"),
        pytest.param(
            "0::/a/b\n",
            {"sys/fs/cgroup/a/b/memory.max": "536870912\n"},
            512,
            "/sys/fs/cgroup/a/b/memory.max",
            id="v2",
        ),
        pytest.param(
            "0::/a/b\n",
            {"sys/fs/cgroup/a/b/memory.max": "max\n", "sys/fs/cgroup/a/b/memory.high": "max\n"},
            8192,
            "/proc/meminfo",
            id="v2 without a limit",
        ),
        pytest.param(
            "0::/a/b\n",
            {"sys/fs/cgroup/a/b/memory.max": "2147483648\n", "sys/fs/cgroup/a/memory.max": "1073741824\n"},
            1024,
            "/sys/fs/cgroup/a/memory.max",
            id="v2, the group above has less",
        ),
        pytest.param(
            "0::/a\n",
            {"sys/fs/cgroup/a/memory.max": "1073741824\n", "sys/fs/cgroup/a/memory.high": "805306368\n"},
            768,
            "/sys/fs/cgroup/a/memory.high",
            id="v2, slowed down from there on",
        ),
        pytest.param(
            "0::/\n",
            {"sys/fs/cgroup/memory.max": "536870912\n"},
            512,
            "/sys/fs/cgroup/memory.max",
            id="v2 in a container",
        ),
        pytest.param(
            "0::/../../system.slice/docker-0.scope\n",
            {"sys/fs/cgroup/memory.max": "536870912\n"},
            512,
            "/sys/fs/cgroup/memory.max",
            id="v2, the path is outside of what is seen",
        ),
        pytest.param(
            "5:cpu,cpuacct:/x\n4:memory:/docker/0\n",
            {
                "sys/fs/cgroup/memory/docker/0/memory.limit_in_bytes": "268435456\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": V1_NO_LIMIT,
                "sys/fs/cgroup/cpu,cpuacct/x/memory.limit_in_bytes": "1\n",
            },
            256,
            "/sys/fs/cgroup/memory/docker/0/memory.limit_in_bytes",
            id="v1",
        ),
        pytest.param(
            "4:memory:/docker/0\n0::/docker/0\n",
            {"sys/fs/cgroup/memory/memory.limit_in_bytes": "536870912\n"},
            512,
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            id="v1 in a container, that shows the path of the host",
        ),
        pytest.param(
            "4:memory:/\n0::/\n",
            {"sys/fs/cgroup/memory/memory.limit_in_bytes": V1_NO_LIMIT},
            8192,
            "/proc/meminfo",
            id="v1 without a limit",
        ),
        pytest.param(
            "0::/a\n", {"sys/fs/cgroup/a/memory.max": "17179869184\n"}, 8192, "/proc/meminfo", id="more than there is"
        ),
        pytest.param(
            "nonsense\n0::/a\n", {"sys/fs/cgroup/a/memory.max": "\n"}, 8192, "/proc/meminfo", id="files nobody knows"
        ),
    ],
)
def test_the_least_of_the_machine_and_all_groups_counts(
    tmp_path: Path, cgroup: str, files: dict[str, str], mib: int, source: str
) -> None:
    limit = memory_limit(kernel(tmp_path, files, cgroup))
    assert (limit.size_bytes, limit.source) == (mib * MIB, source)


class ProbeSettings(CommonSettings):
    service: ClassVar[str] = "memory-probe"

    probe_bytes: int = Field(default_factory=MemoryShare(part=8, least=16 * MIB, most=128 * MIB))
    probe_entries: int = Field(default_factory=MemoryShare(part=2, least=1, most=4, unit=100 * MIB))


@pytest.mark.parametrize(
    ("limit_mib", "size_mib", "entries"), [(64, 16, 1), (256, 32, 1), (512, 64, 2), (1024, 128, 4), (65536, 128, 4)]
)
def test_defaults_are_parts_of_the_limit_between_bounds(limit_mib: int, size_mib: int, entries: int) -> None:
    settings = ProbeSettings.load({"STREAMHOUSE_MEMORY_LIMIT_BYTES": str(limit_mib * MIB)})
    assert (settings.probe_bytes, settings.probe_entries) == (size_mib * MIB, entries)


def test_what_is_given_is_not_changed() -> None:
    settings = ProbeSettings.load({"STREAMHOUSE_MEMORY_LIMIT_BYTES": str(64 * MIB), "STREAMHOUSE_PROBE_BYTES": "77"})
    assert settings.probe_bytes == 77


def test_the_limit_its_source_and_what_follows_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = kernel(tmp_path, {"sys/fs/cgroup/a/memory.max": "536870912\n"}, "0::/a\n")
    with caplog.at_level(logging.INFO):
        probe = ProbeSettings.load({}, probe_bytes=64 * MIB, probe_entries=2)
        log_memory_limits(probe, probe, root=root)
        log_memory_limits(ProbeSettings.load({}, memory_limit_bytes=64 * MIB))
    first, second = caplog.messages
    assert first.startswith("memory: 512 MiB (/sys/fs/cgroup/a/memory.max), of which ")
    assert "probe_bytes 64 MiB, probe_entries 2" in first
    assert first.count("receive_window_bytes") == first.count("probe_bytes") == 1
    assert second.startswith("memory: 64 MiB (memory_limit_bytes), of which ")
    assert "probe_bytes 16 MiB, probe_entries 1" in second


CHURN = """
import ctypes, sys
from pathlib import Path
from shruntime.memory import give_back_freed_memory
if sys.argv[1] == "tuned" and not give_back_freed_memory():
    sys.exit(3)
def resident(): return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
before = resident()
for _ in range(3):
    largest = bytearray(20 * 1024 * 1024)
    del largest
kept, blocks = [], []
for _ in range(40):
    blocks.append(bytearray(4 * 1024 * 1024))
    blocks[-1][::4096] = bytes(1024)  # so that all its pages are there
    kept.append([bytes(2000) for _ in range(20)])  # more than fits into the holes before
del blocks
print((resident() - before) // (1024 * 1024))
"""


def test_freed_batches_go_back_to_the_system() -> None:
    """Forty of 4 MiB, with small blocks between them that stay."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_"))}

    def left_mib(how: str) -> int:
        command = [sys.executable, "-c", CHURN, how]
        ended = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        if ended.returncode == 3:
            pytest.skip("the C library is not glibc")
        assert ended.returncode == 0, ended.stderr
        return int(ended.stdout)

    assert left_mib("tuned") < 30
    assert left_mib("as it is") > 100, "glibc gives it back by itself now: the setting is not needed any more"


def test_variables_for_the_allocator_are_left_alone() -> None:
    code = "from shruntime.memory import give_back_freed_memory; print(give_back_freed_memory())"
    environ = {**os.environ, "MALLOC_ARENA_MAX": "3"}
    ended = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert ended.stdout == "False\n"


def test_what_is_loaded_is_not_looked_at_again() -> None:
    code = (
        "import gc, asyncio\n"
        "from shruntime.memory import spare_loaded_code\n"
        "loaded = len(gc.get_objects())\n"
        "spare_loaded_code()\n"
        "print(len(gc.get_objects()) < loaded / 10 and gc.isenabled())"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "True\n"
