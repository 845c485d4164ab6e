"""A control group with a memory limit, where this machine lets one be made: version 1 or 2."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


class MemoryGroup:
    """A group below that of this process. Raises OSError where it cannot be made."""

    def __init__(self, name: str, limit_bytes: int) -> None:
        above, limit_name = _own_group()
        self._path = above / name
        self._path.mkdir()
        try:
            (self._path / limit_name).write_text(str(limit_bytes))
        except OSError:
            self.remove()
            raise
        self.limit_path = self._path / limit_name

    def command(self, arguments: Sequence[str]) -> list[str]:
        """A command that runs another one, which has these arguments, in the group."""
        return ["sh", "-c", f'echo $$ >"{self._path}/cgroup.procs" && exec "$@"', "sh", *arguments]

    @property
    def oom_kills(self) -> int:
        """How many processes the kernel has ended because the group had no memory left."""
        for name in ("memory.events", "memory.oom_control"):
            with contextlib.suppress(FileNotFoundError):
                lines = (self._path / name).read_text().splitlines()
                return next(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
        raise AssertionError(f"the kernel counts no kills in {self._path}")

    def remove(self) -> None:
        """Nothing may run in it any more."""
        self._path.rmdir()


def _own_group() -> tuple[Path, str]:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            return ROOT / "memory" / path.lstrip("/"), "memory.limit_in_bytes"
        if not controllers and (ROOT / path.lstrip("/") / "memory.max").exists():
            return ROOT / path.lstrip("/"), "memory.max"
    raise OSError("no group with a memory controller")
