"""Faults inside a process: failing fsync, a wall clock that is wrong, connections that go by links of its own. Built
from shim.c with gcc."""

import shutil
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path

_CONTROL = struct.Struct("=i4xq")


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
        self._clock_shift_ms = 0
        self._write()

    def environ(self, library: Path, routes: Mapping[str, str] | None = None) -> dict[str, str]:
        """Variables of the process. `routes`: to be connected to the value, whoever asks for the key (host:port)."""
        ports = (f"{_port(asked)}={_port(given)}" for asked, given in (routes or {}).items())
        return {"LD_PRELOAD": str(library), "FAULT_CONTROL": str(self.path), "FAULT_ROUTES": ",".join(ports)}

    def fail_fsync(self, fails: bool) -> None:
        self._fsync_fails = fails
        self._write()

    def shift_clock(self, shift_ms: int) -> None:
        self._clock_shift_ms = shift_ms
        self._write()

    def heal(self) -> None:
        self._fsync_fails, self._clock_shift_ms = False, 0
        self._write()

    def _write(self) -> None:
        """In place: the process has the file mapped."""
        self.path.touch()
        with self.path.open("r+b") as file:
            file.write(_CONTROL.pack(self._fsync_fails, self._clock_shift_ms))


def _port(address: str) -> str:
    return address.rpartition(":")[2]
