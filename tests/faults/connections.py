"""TCP connections of a process, as Linux tells them."""

import re
from pathlib import Path

ESTABLISHED = "01"
_SOCKET = re.compile(r"socket:\[(\d+)]")


def ports_reached(pid: int) -> set[int]:
    """Returns the remote ports of a process's established TCP connections; nothing for a process that has ended."""
    own = _sockets(pid)
    reached = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, _, remote, state, *_, inode = line.split()[:10]
            if state == ESTABLISHED and inode in own:
                reached.add(int(remote.rpartition(":")[2], 16))
    return reached


def _sockets(pid: int) -> set[str]:
    """Returns the inodes of a process's sockets."""
    found = set()
    try:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            if match := _SOCKET.fullmatch(_target(link)):
                found.add(match[1])
    except (FileNotFoundError, ProcessLookupError):
        return set()
    return found


def _target(link: Path) -> str:
    """Returns what a descriptor stands for; nothing if it was closed meanwhile."""
    try:
        return str(link.readlink())
    except (FileNotFoundError, ProcessLookupError):
        return ""
