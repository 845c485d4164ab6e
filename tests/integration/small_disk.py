"""A file system of a few bytes, to be full: a tmpfs, where this machine allows to mount one."""

import contextlib
import os
import shutil
import subprocess
from pathlib import Path


def mount(path: Path, size_bytes: int) -> bool:
    """Returns True if `path`, a directory, is a file system of its own from now on."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes},mode=0755", "tmpfs", str(path)]
    return bool(shutil.which("mount")) and subprocess.run(command, capture_output=True, check=False).returncode == 0


def unmount(path: Path) -> None:
    """Whatever still uses it."""
    subprocess.run(["umount", "-l", str(path)], check=True)


def fill(path: Path) -> None:
    """Makes a file of all bytes that are left beside it."""
    file = os.open(path, os.O_CREAT | os.O_WRONLY)
    try:
        for chunk in (1024 * 1024, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    os.write(file, b"\0" * chunk)
    finally:
        os.close(file)
