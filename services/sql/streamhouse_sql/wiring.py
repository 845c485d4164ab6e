"""Puts the SQL service together: the only place of it that names concrete classes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from shcluster.agent_checks import AgentChecks
from shcluster.peers import Peers
from shcluster.session import SessionKeeper
from shproto.services import CoordinatorApi
from shproto.v1 import sql_pb2
from shread.engine import build_engine, export_metrics
from shread.reads import Reads
from shruntime import service
from shruntime.clock import SystemClock
from shruntime.disk_space import DiskSpace
from shruntime.memory import MIB
from shruntime.server import ListenError
from shruntime.service import Apis, ServiceContext
from shruntime.tasks import Tasks
from shstore.open import configured_store

from streamhouse_sql.adapters.duck import Duck, DuckLimits, open_temp_dir
from streamhouse_sql.api import SqlApi
from streamhouse_sql.catalog import Catalog
from streamhouse_sql.pgwire.server import PgServer
from streamhouse_sql.service import SqlService
from streamhouse_sql.settings import SqlSettings

log = logging.getLogger(__name__)

# For statements that run when the service stops: they are ended with ShuttingDown, which takes a moment.
CALL_GRACE_MS = 1_000
ROLE = "sql"
# Memory of the catalogue that PostgreSQL's clients ask, and of all queries of it.
CATALOGUE_BYTES_MAX = 128 * MIB


class Presence(Protocol):
    """The session that makes the service known to clients: a read engine of its own has one, and keeps the index, too;
    else it is a session beside the engine of the process."""

    @property
    def tasks(self) -> Tasks: ...

    async def start(self, address: str, /) -> None: ...

    async def stop(self) -> None: ...


class _Session:
    """A session for a service whose read engine belongs to another service of the process."""

    def __init__(self, session: SessionKeeper) -> None:
        self._session = session
        self.tasks = Tasks()

    async def start(self, address: str) -> None:
        self._session.start(address)
        await self._session.open()
        self.tasks.spawn("sql session", self._session.run())

    async def stop(self) -> None:
        await self.tasks.stop()
        await self._session.close()


@dataclass(kw_only=True)
class SqlParts:
    """The parts of a running SQL service."""

    api: SqlApi
    _service: SqlService
    _presence: Presence
    _measuring: Mapping[str, Callable[[], Coroutine[None, None, None]]]
    _temp_dir: Path
    _pg: PgServer | None
    _pg_is_chosen: bool

    @property
    def tasks(self) -> Tasks:
        """Background tasks; reports one that died."""
        return self._presence.tasks

    async def start(self, address: str) -> None:
        """Opens the session under which clients find `address`. Waits for a coordinator. Raises CacheDirError,
        ListenError, and SettingsError if the directory of spill files cannot be used."""
        await asyncio.to_thread(open_temp_dir, self._temp_dir)
        await self._presence.start(address)
        for name, measure in self._measuring.items():
            self.tasks.spawn(name, measure())
        if self._pg is not None:
            await self._start_pg(self._pg)

    async def _start_pg(self, server: PgServer) -> None:
        """Begins to listen for PostgreSQL's clients. The default port is often PostgreSQL's own second server: the
        platform goes on without it. Raises ListenError for an address that somebody chose."""
        try:
            await server.start()
        except ListenError as error:
            if self._pg_is_chosen:
                raise
            log.warning(
                "%s: PostgreSQL's clients cannot connect; set sql_pg_listen (STREAMHOUSE_SQL_PG_LISTEN) to another "
                "address, port 0 for any that is free, or to nothing to switch it off",
                error,
            )

    @property
    def pg_address(self) -> str:
        """Address of the PostgreSQL wire protocol; empty where nothing listens."""
        return self._pg.address if self._pg is not None else ""

    @property
    def apis(self) -> Apis:
        """RPC services of the process, with their names."""
        return [(sql_pb2.DESCRIPTOR.services_by_name["Sql"], self.api)]

    async def failed(self) -> None:
        """Waits for ever. Raises the error that ended a background task."""
        await self.tasks.raise_failure()

    async def stop(self) -> None:
        """Ends statements with ShuttingDown, gives the session back. Safe after a failed start."""
        if self._pg is not None:
            await self._pg.stop()
        await self._service.close()
        await self._presence.stop()


def build(settings: SqlSettings, coordinator: CoordinatorApi, reads: Reads) -> SqlParts:
    """Returns the service over the reads of another service of the process; does no I/O."""
    # It calls no agent itself: reads do, and the service that they belong to reports what it sees of them.
    agents = AgentChecks(reads.ingest_at)
    session = SessionKeeper(coordinator, SystemClock(), agents, role=ROLE, agent_id=settings.agent_id)
    return _parts(settings, coordinator, reads, _Session(session), {})


def _parts(
    settings: SqlSettings,
    coordinator: CoordinatorApi,
    reads: Reads,
    presence: Presence,
    measuring: Mapping[str, Callable[[], Coroutine[None, None, None]]],
) -> SqlParts:
    # sqlglot warns of each statement that it does not know; the refusal names it.
    logging.getLogger("sqlglot").setLevel(logging.ERROR)
    limits = DuckLimits(
        memory_bytes_max=settings.sql_memory_bytes_max,
        temp_dir=settings.sql_temp_dir,
        temp_bytes_max=settings.sql_temp_bytes_max,
        threads=settings.sql_threads,
    )
    # Its tables have some thousand rows; queries of it do not spill.
    catalogue_limits = DuckLimits(
        memory_bytes_max=CATALOGUE_BYTES_MAX, temp_dir=settings.sql_temp_dir, temp_bytes_max=0, threads=1
    )
    sql = SqlService(reads, Catalog(reads, coordinator), settings, lambda: Duck(limits))
    return SqlParts(
        api=SqlApi(sql),
        _service=sql,
        _presence=presence,
        _measuring=measuring,
        _pg=PgServer(sql, settings, lambda: Duck(catalogue_limits)) if settings.sql_pg_listen else None,
        _pg_is_chosen="sql_pg_listen" in settings.model_fields_set,
        _temp_dir=settings.sql_temp_dir,
    )


async def run(settings: SqlSettings) -> None:
    """Runs the SQL service as a process of its own, with a read engine of its own, until SIGINT or SIGTERM.

    Raises SettingsError, StoreError (the object store refuses), CacheDirError, ListenError.
    """

    def over_network(context: ServiceContext) -> SqlParts:
        clock = SystemClock()
        store = configured_store(settings)
        context.close_at_end(store.close)
        context.wait_for(store.wait_until_usable)
        peers = Peers(settings.bootstrap, settings.rpc_timeout_ms, context.telemetry)
        context.close_at_end(peers.close)
        engine = build_engine(
            settings, peers.coordinator, store, peers.ingest, clock, role=ROLE, agent_id=settings.agent_id
        )
        space = DiskSpace(settings.cache_dir, clock)
        export_metrics(engine, lambda: space.free_bytes)
        measuring = {"free space of the cache's disk": space.run} if settings.is_measured else {}
        return _parts(settings, peers.coordinator, engine.reads, engine, measuring)

    await service.run(settings, over_network, call_grace_ms=CALL_GRACE_MS)
