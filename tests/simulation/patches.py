"""While a simulation runs, the services' modules meet the simulated machines instead of the real one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from shcluster import peers
from shread import engine as read_engine
from shruntime import files
from streamhouse_coordinator.core import sessions as coordinator_sessions
from streamhouse_ingest import wiring as ingest_wiring
from streamhouse_ingest.adapters import wal, wal_directory, wal_note, wal_replay
from streamhouse_ingest.sealing import sealer

from tests.simulation.cache import SimChunkCache
from tests.simulation.disk import SimDisk
from tests.simulation.loop import PROCESS, SimLoop
from tests.simulation.machines import FcntlModule, Machines, MmapModule, SimPath


@contextmanager
def patched(
    loop: SimLoop,
    disks: Mapping[str, SimDisk],
    connection: Callable[..., Any],
    log: logging.Handler,
    small_messages: bool,
) -> Iterator[None]:
    """`disks` by the directory that stands for them; the SDK's calls go over what `connection` makes; all log records
    go to `log`. `small_messages`: what agents and coordinators tell each other of producers takes many."""
    machines = Machines(loop)
    root = logging.getLogger()
    level = root.level
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(ingest_wiring, "Path", lambda path: SimPath(disks[path])))
        for module in (wal, wal_directory, wal_note, wal_replay, files):
            stack.enter_context(mock.patch.object(module, "os", machines))
        stack.enter_context(mock.patch.object(files, "make_directory", lambda path: None))  # a disk is one directory
        stack.enter_context(mock.patch.object(files, "make_private", lambda path: True))  # of one user
        for module in (wal_directory, files):
            stack.enter_context(mock.patch.object(module, "fcntl", FcntlModule(machines)))
        stack.enter_context(mock.patch.object(wal_replay, "mmap", MmapModule(machines)))
        stack.enter_context(mock.patch.object(read_engine, "DiskCache", SimChunkCache))
        stack.enter_context(mock.patch.object(peers, "Connection", connection))
        if small_messages:
            stack.enter_context(mock.patch.object(coordinator_sessions, "SNAPSHOTS_BYTES_MAX", 1))
            stack.enter_context(mock.patch.object(sealer, "SNAPSHOTS_BYTES_MAX", 1))
        root.addHandler(log)
        root.setLevel(logging.INFO)
        try:
            yield
        finally:
            root.removeHandler(log)
            root.setLevel(level)


class LogHandler(logging.Handler):
    """Log records of services and clients, into the run's log. A defect that was caught and logged is an anomaly."""

    def __init__(self, loop: SimLoop, log: Callable[[str, str], None], blame: Callable[[str, str], None]) -> None:
        super().__init__(logging.INFO)
        self._loop = loop
        self._log = log
        self._blame = blame

    def emit(self, record: logging.LogRecord) -> None:
        process = PROCESS.get(self._loop.world)
        text = f"{record.levelname} {record.name}: {record.getMessage()}"
        self._log(process.name, text)
        if record.exc_info and record.exc_info[1] is not None:
            self._blame("defect", f"{process.name}: {text}: {record.exc_info[1]!r}")
