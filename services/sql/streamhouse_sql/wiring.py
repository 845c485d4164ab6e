"""Puts the SQL service together: the only place of it that names concrete classes."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from shcluster.peers import Peers
from shproto.services import CoordinatorApi
from shproto.v1 import sql_pb2
from shread.engine import ReadEngine, build_engine, export_metrics
from shruntime import service
from shruntime.clock import SystemClock
from shruntime.disk_space import DiskSpace
from shruntime.memory import MIB
from shruntime.service import Apis, ServiceContext
from shruntime.tasks import Tasks
from shstore import ObjectStore
from shstore.open import configured_store

from streamhouse_sql import telemetry
from streamhouse_sql.adapters.duck import Duck, DuckLimits, open_temp_dir
from streamhouse_sql.api import SqlApi
from streamhouse_sql.catalog import Catalog
from streamhouse_sql.jobs.statements import JobStatements
from streamhouse_sql.jobs.views import Views
from streamhouse_sql.jobs.wiring import build_worker, planner
from streamhouse_sql.jobs.worker import JobWorker
from streamhouse_sql.pg_listener import open_listener
from streamhouse_sql.pgwire.server import PgServer
from streamhouse_sql.service import SqlService
from streamhouse_sql.settings import SqlSettings

# For statements that run when the service stops: they are ended with ShuttingDown, which takes a moment.
CALL_GRACE_MS = 1_000
ROLE = "sql"
# Memory of the catalogue that PostgreSQL's clients ask, and of all queries of it.
CATALOGUE_BYTES_MAX = 128 * MIB


@dataclass(kw_only=True)
class SqlParts:
    """The parts of a running SQL service."""

    api: SqlApi
    _service: SqlService
    _engine: ReadEngine
    _measuring: Mapping[str, Callable[[], Coroutine[None, None, None]]]
    _temp_dir: Path
    _worker: JobWorker
    _pg: PgServer
    _listen: Callable[[], socket.socket | None]

    @property
    def tasks(self) -> Tasks:
        """Background tasks; reports one that died."""
        return self._engine.tasks

    async def start(self, address: str) -> None:
        """Opens the session under which clients find `address`. Waits for a coordinator. Raises CacheDirError,
        ListenError, and SettingsError if the directory of spill files cannot be used."""
        await asyncio.to_thread(open_temp_dir, self._temp_dir)
        await self._engine.start(address)
        for name, measure in self._measuring.items():
            self.tasks.spawn(name, measure())
        telemetry.export_jobs(self._worker.gauges())
        self.tasks.spawn("jobs", self._worker.run())
        if (listener := self._listen()) is not None:
            await self._pg.start(listener)

    @property
    def pg_address(self) -> str:
        """Address of the PostgreSQL wire protocol; empty where nothing listens."""
        return self._pg.address

    @property
    def apis(self) -> Apis:
        """RPC services of the process, with their names."""
        return [(sql_pb2.DESCRIPTOR.services_by_name["Sql"], self.api)]

    async def failed(self) -> None:
        """Waits for ever. Raises the error that ended a background task."""
        await self.tasks.raise_failure()

    async def stop(self) -> None:
        """Ends statements with ShuttingDown, gives the session back. Safe after a failed start."""
        await self._pg.stop()
        await self._service.close()
        await self._service.views.close()
        await self._worker.stop()  # while reads and the session are there: checkpoints are stored, jobs given back
        await self._engine.stop()


def build(
    settings: SqlSettings,
    coordinator: CoordinatorApi,
    engine: ReadEngine,
    store: ObjectStore,
    peers: Peers,
    measuring: Mapping[str, Callable[[], Coroutine[None, None, None]]],
    listen: Callable[[], socket.socket | None],
) -> SqlParts:
    """Returns the service over its read engine; does no I/O. `store`: of the state of jobs; `peers`: of their output.
    `listen` opens the socket of PostgreSQL's clients, None
    for none."""
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
    worker = build_worker(settings, coordinator, engine.reads, store, peers, lambda: engine.session_token)
    catalog = Catalog(engine.reads, coordinator)
    views = Views(
        coordinator,
        worker,
        settings,
        engine.reads.clock,
        lambda job: worker.parts.plan_of(job, catalog.topics()).plan.output_columns,
        peers.sql,
    )
    statements = JobStatements(coordinator, catalog, settings, planner(settings), views.changed, worker.trouble)
    # The order of rows, and so their sums, is part of the result.
    one_thread = replace(limits, threads=1)
    sql = SqlService(engine.reads, catalog, settings, lambda: Duck(limits), lambda: Duck(one_thread), statements, views)
    return SqlParts(
        api=SqlApi(sql),
        _service=sql,
        _engine=engine,
        _worker=worker,
        _measuring=measuring,
        _pg=PgServer(sql, settings, lambda: Duck(catalogue_limits)),
        _listen=listen,
        _temp_dir=settings.sql_temp_dir,
    )


async def run(
    settings: SqlSettings,
    *,
    listener: socket.socket | None = None,
    on_serving: Callable[[str], None] = lambda address: None,
) -> None:
    """Runs the SQL service as a process of its own, with a read engine of its own, until SIGINT or SIGTERM.

    listener: of PostgreSQL's clients; None: opened as the settings say. on_serving: called with the address of the
    gRPC server, once the service has started.

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
        return build(
            settings,
            peers.coordinator,
            engine,
            store,
            peers,
            measuring,
            lambda: open_listener(settings) if listener is None else listener,
        )

    await service.run(settings, over_network, call_grace_ms=CALL_GRACE_MS, on_serving=on_serving)
