"""Refuses gRPC in a process that was forked from one that had used it.

Owns: the knowledge that gRPC was used, and which of its channels and servers are alive.
Invariants: a process that is refused stays refused, and so do the processes that it forks; no object of gRPC is ever
called or freed there.
"""

import ctypes
import os
import weakref

MESSAGE = (
    "this process was forked from one that had used the client, and gRPC does not work in it: use the client only "
    "after forking, or start processes with the method `spawn`"
)

_used = False
_alive: "weakref.WeakSet[object]" = weakref.WeakSet()
lost = False  # gRPC's threads stayed behind in the parent. Read directly where `check` would be called for each record


def check() -> None:
    """Refuses gRPC in a process that was forked from one that had used it. Raises RuntimeError.

    A call there would wait for ever, past its deadline, or crash the process: gRPC's threads did not come along, and
    its epoll descriptors are shared with the parent.
    """
    if lost:
        raise RuntimeError(MESSAGE)


def note(used: object) -> None:
    """Notes that this process uses gRPC from here on: `used` is a channel or a server that was just made."""
    global _used
    _used = True
    _alive.add(used)


def _after_in_child() -> None:
    """Makes the live objects of gRPC immortal: freeing the last channel joins gRPC's poller thread, which does not
    exist in the child. The garbage collector alone would hang a child that does not use the client."""
    global lost
    if _used:
        lost = True
        for used in _alive:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(used))


os.register_at_fork(after_in_child=_after_in_child)
