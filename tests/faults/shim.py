"""Faults inside a service's process: failing fsync, a wall clock that is wrong. Built from shim.c with gcc."""

import shutil
import struct
import subprocess
from pathlib import Path

_CONTROL = struct.Struct("=ii")


def build(work_dir: Path) -> Path | None:
    """The shared library; None where there is no C compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return None
    library = work_dir / "shim.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run(
        [compiler, "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True
    )
    return library


class Control:
    """What one process is to suffer; takes effect at once, and on every later process with the same file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fsync_fails = False
        self._clock_shift_s = 0
        self._write()

    def environ(self, library: Path) -> dict[str, str]:
        return {"LD_PRELOAD": str(library), "FAULT_CONTROL": str(self.path)}

    def fail_fsync(self, fails: bool) -> None:
        self._fsync_fails = fails
        self._write()

    def shift_clock(self, seconds: int) -> None:
        self._clock_shift_s = seconds
        self._write()

    def heal(self) -> None:
        self._fsync_fails, self._clock_shift_s = False, 0
        self._write()

    def _write(self) -> None:
        """In place: the process has the file mapped."""
        self.path.touch()
        with self.path.open("r+b") as file:
            file.write(_CONTROL.pack(self._fsync_fails, self._clock_shift_s))
