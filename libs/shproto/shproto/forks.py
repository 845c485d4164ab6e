"""Refuses gRPC in a process that was forked from one that had used it.

Owns: whether gRPC was used before the last fork, and which of its channels and servers are alive.
Invariants: a process that is refused stays refused, and so do the processes that it forks; in it nothing of gRPC's is
ever called or freed.
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
lost = False  # gRPC's threads stayed behind in the parent; read where a call of `check` for each record would cost


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
    """Makes what is alive of gRPC immortal: freeing the last channel joins gRPC's poller thread, which is not there.
    The collector alone would be enough to hang a child that never thought of the client."""
    global lost
    if _used:
        lost = True
        for used in _alive:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(used))


os.register_at_fork(after_in_child=_after_in_child)
