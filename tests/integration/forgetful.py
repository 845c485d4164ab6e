"""A file system that forgets: below one directory, processes keep over a power cut what they fsynced and nothing else,
neither a file's content nor its name. Built from forgetful.c with gcc; works on any file system, without root."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest


class ForgetfulDirectory:
    """`path` is the directory, empty at first; processes started with `environ` are on the file system that forgets."""

    def __init__(self, work_dir: Path) -> None:
        compiler = shutil.which("gcc") or shutil.which("cc")
        if compiler is None:
            pytest.skip("no C compiler for the library that notes what was fsynced")
        self.path = work_dir / "forgetful"
        self.path.mkdir()
        self._shadow = work_dir / "shadow"
        self._shadow.mkdir()
        self._shadow.chmod(0o777)  # PostgreSQL may run as another user
        self._cut = work_dir / "shadow-cut"
        library = work_dir / "forgetful.so"
        constants = [f'-DROOT="{self.path}"', f'-DSHADOW="{self._shadow}"']
        source = str(Path(__file__).with_name("forgetful.c"))
        options = ["-O1", "-Wall", "-Werror", "-shared", "-fPIC", *constants]
        subprocess.run([compiler, *options, "-o", str(library), source], check=True)
        self.environ = {"LD_PRELOAD": str(library)}

    def cut_power(self) -> None:
        """From now on nothing becomes durable any more, whatever the processes still do."""
        self._shadow.rename(self._cut)

    def leave(self, target: Path) -> None:
        """Makes `target` the directory as it is after the power cut: with what was durable."""
        self._leave((self._cut / "root").read_text(), target)

    def _leave(self, inode: str, target: Path) -> None:
        target.mkdir()
        for kind, mode, child, name in self._names(inode):
            path = target / name
            if kind == "d":
                self._leave(child, path)
            elif kind == "f":
                kept = self._cut / child
                path.write_bytes(kept.read_bytes() if kept.exists() else b"")
            else:
                assert name.startswith(".s."), f"{path} is neither a file nor a directory"  # PostgreSQL's socket
                continue
            path.chmod(mode)

    def _names(self, inode: str) -> list[tuple[str, int, str, str]]:
        kept = self._cut / inode
        lines = os.fsdecode(kept.read_bytes()).split("\0")[:-1] if kept.exists() else []
        fields = [line.split(" ", 3) for line in lines]
        return [(kind, int(mode, 8), child, name) for kind, mode, child, name in fields]
