"""Puts the services of the log into one process: the only place of the embedded platform that names concrete classes.

They call each other's API objects directly; SQL runs in a child process. Clients reach all of them on one gRPC port.
Start order: PostgreSQL, coordinator, segmenter, query, gRPC server, ingest, SQL. Stop order: SQL, ingest, query,
segmenter, gRPC server, coordinator, PostgreSQL, so that ingest drains while everything needed to seal, upload and
register still runs.

Owns: the parts of the process, the order of their start and stop, the health status of the gRPC server. Does not own:
the work of the parts, the data directory's layout (data_dir.py), PostgreSQL's process (postgres.py).
Invariants: a start that fails or is cancelled stops the parts that were started. The health status is SERVING only
once all parts have started, and while PostgreSQL, if the platform runs it, answers. A part that dies fails `tasks`.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

from shproto.services import IngestApi
from shproto.v1 import coordinator_pb2, ingest_pb2, query_pb2, sql_pb2
from shruntime.advertise import advertised_address
from shruntime.memory import log_memory_limits
from shruntime.server import RpcServer, ServerLimits, check_listen
from shruntime.service import prepare_process
from shruntime.supervisor import Supervisor
from shruntime.tasks import Tasks, wait_for_stop
from shruntime.telemetry import Telemetry
from shruntime.urls import is_unspecified
from shstore import ObjectStore
from shstore.open import configured_store
from shstore.settings import StoreSettings
from streamhouse_coordinator import wiring as coordinator_wiring
from streamhouse_coordinator.settings import CoordinatorSettings
from streamhouse_ingest import wiring as ingest_wiring
from streamhouse_ingest.settings import IngestSettings
from streamhouse_query import wiring as query_wiring
from streamhouse_query.settings import QuerySettings
from streamhouse_segmenter import wiring as segmenter_wiring
from streamhouse_segmenter.settings import SegmenterSettings
from streamhouse_sql.settings import SqlSettings

from streamhouse_embedded.data_dir import DataDir
from streamhouse_embedded.postgres import EmbeddedPostgres
from streamhouse_embedded.settings import EmbeddedSettings
from streamhouse_embedded.sql_process import SqlProcess

log = logging.getLogger(__name__)

AGENT_ID = "embedded"
# Calls that still run after the drain are long polls of consumers; they retry.
CALL_GRACE_MS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """Addresses, data directory and database that `serve` prints once clients can connect. `sql_pg_address`: of the
    PostgreSQL wire protocol, empty where nothing listens; `postgres_dsn` is the metadata's own database."""

    address: str
    data_dir: str
    postgres_dsn: str
    sql_pg_address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Services:
    """The settings of all services in this process."""

    store: StoreSettings
    coordinator: CoordinatorSettings
    ingest: IngestSettings
    query: QuerySettings
    segmenter: SegmenterSettings
    sql: SqlSettings

    @staticmethod
    def load(data_dir: DataDir) -> "_Services":
        """Returns the settings from the environment. Raises SettingsError."""
        return _Services(
            store=StoreSettings.load(store_dir=str(data_dir.objects)),
            coordinator=CoordinatorSettings.load(amqp_url=""),
            ingest=IngestSettings.load(wal_dir=str(data_dir.wal), agent_id=AGENT_ID),
            query=QuerySettings.load(cache_dir=str(data_dir.cache)),
            segmenter=SegmenterSettings.load(worker_id=AGENT_ID, amqp_url=""),
            sql=SqlSettings.load(
                store_dir=str(data_dir.objects),
                cache_dir=str(data_dir.sql / "cache"),
                sql_temp_dir=str(data_dir.sql / "spill"),
            ),
        )


class EmbeddedPlatform:
    """A whole StreamHouse in one process. Raises SettingsError, before anything is created.

    `start` raises DataDirError, ListenError, PostgresError, StoreError, and SettingsError for an unusable pg_dsn.
    """

    def __init__(self, settings: EmbeddedSettings, supervisor: Supervisor | None = None) -> None:
        self._settings = settings
        self._supervisor = supervisor
        self._data_dir = DataDir(settings.data_dir)
        self._services = _Services.load(self._data_dir)
        self._stack = contextlib.AsyncExitStack()
        self._serving: RpcServer | None = None
        self._database_answers = True
        self.tasks = Tasks()

    async def start(self) -> Ready:
        """Starts all parts and returns their addresses once clients can connect. A failed start stops the parts that
        were started; its errors are those of the class docstring."""
        try:
            return await self._start()
        except BaseException:
            await self.tasks.stop()  # the watch of PostgreSQL begins with the database
            await self._stack.aclose()
            raise

    async def stop(self) -> None:
        """Drains: seals, uploads, registers, gives the leases back; then stops everything."""
        serving, self._serving = self._serving, None
        if serving is not None:
            await serving.set_serving(False)
        await self._stack.aclose()

    async def _start(self) -> Ready:
        self._stack.callback(self._data_dir.unlock)
        self._data_dir.lock()
        services = self._services
        await check_listen(self._settings.listen)  # before a first start takes its time for the database
        log_memory_limits(self._settings, services.ingest, services.segmenter, services.query, services.sql)
        telemetry = Telemetry.configure("embedded", self._settings)
        self._stack.callback(telemetry.shutdown)
        # Beside the start of the database: its imports take as long.
        sql = SqlProcess(services.sql, telemetry)
        self._stack.push_async_callback(sql.stop)
        sql.launch()
        dsn = self._settings.pg_dsn or await self._start_postgres()
        store = await self._open_store()

        coordinator = coordinator_wiring.build(services.coordinator.model_copy(update={"pg_dsn": dsn}))
        ingest = ingest_wiring.build(services.ingest, coordinator.api)
        query = query_wiring.build(services.query, coordinator.api, store, _always(ingest.api))
        segmenter = segmenter_wiring.build(services.segmenter, coordinator.api, store, _always(ingest.api))
        apis = (
            (coordinator_pb2.DESCRIPTOR.services_by_name["Coordinator"], coordinator.api),
            (ingest_pb2.DESCRIPTOR.services_by_name["Ingest"], ingest.api),
            (query_pb2.DESCRIPTOR.services_by_name["Query"], query.api),
            (sql_pb2.DESCRIPTOR.services_by_name["Sql"], sql),
        )
        limits = ServerLimits.of(self._settings)
        server = RpcServer(self._settings.listen, apis, telemetry.server(), limits, self._supervisor)
        # Each stop is registered before its start, which may fail or be cancelled half-way.
        self._stack.push_async_callback(coordinator.stop)
        self._stack.push_async_callback(server.stop, CALL_GRACE_MS)
        await server.bind()
        address = await advertised_address(self._settings, server.address)

        await coordinator.start()
        await coordinator.open_session(address)
        self._stack.push_async_callback(segmenter.stop)
        await segmenter.start()
        self._stack.push_async_callback(query.stop)
        await query.start(address)
        # Before the agent, which waits until metadata that went back are repaired: the repair needs the coordinator.
        await server.start()
        self._stack.push_async_callback(ingest.stop)
        await ingest.start(address)
        self._stack.push_async_callback(sql.stop)  # before the drain: what its jobs write to still runs
        await sql.start(
            bootstrap=_local(server.address),
            advertise=address,
            prometheus_listen=self._settings.sql_prometheus_listen,
        )
        self._stack.push_async_callback(self.tasks.stop)
        self.tasks.spawn("coordinator watch", coordinator.failed())
        for name, tasks in (
            ("ingest", ingest.tasks),
            ("query", query.tasks),
            ("segmenter", segmenter.tasks),
        ):
            self.tasks.spawn(f"{name} watch", tasks.raise_failure())
        self.tasks.spawn("SQL watch", sql.failed())
        if self._supervisor is not None:
            self._supervisor.on_hangup(sql.reopen_log_file)
        self._serving = server
        await self._update_health()
        return Ready(
            address=address, data_dir=str(self._data_dir.path), postgres_dsn=dsn, sql_pg_address=sql.pg_address
        )

    async def _start_postgres(self) -> str:
        postgres = EmbeddedPostgres(
            self._data_dir.postgres,
            bin_dir=self._settings.pg_bin_dir or None,
            shared_buffers_bytes=self._settings.pg_shared_buffers_bytes,
        )
        dsn = await postgres.start()
        self._stack.push_async_callback(postgres.stop)
        watch = Tasks()
        watch.spawn("PostgreSQL", postgres.keep_running(self._on_database_change))
        self._stack.push_async_callback(watch.stop)  # after the drain, which registers the rest of the log
        self.tasks.spawn("PostgreSQL watch", watch.raise_failure())
        return dsn

    async def _on_database_change(self, answers: bool) -> None:
        self._database_answers = answers
        await self._update_health()

    async def _update_health(self) -> None:
        if self._serving is not None:
            await self._serving.set_serving(self._database_answers)

    async def _open_store(self) -> ObjectStore:
        store = configured_store(self._services.store)
        self._stack.push_async_callback(store.close)
        await store.wait_until_usable()
        return store


def _local(bound: str) -> str:
    """Returns the address at which this machine reaches a server that is bound to `bound`."""
    host, _, port = bound.rpartition(":")
    if not is_unspecified(host):
        return bound
    return f"[::1]:{port}" if host.startswith("[") else f"127.0.0.1:{port}"


def _always(api: IngestApi) -> Callable[[str], IngestApi]:
    """Returns the only agent, for every address."""
    return lambda address: api


async def serve(settings: EmbeddedSettings, on_ready: Callable[[Ready], None]) -> None:
    """Runs the platform until SIGINT or SIGTERM, then drains; SIGHUP opens the log file again. Raises the errors of
    `EmbeddedPlatform.start`."""
    prepare_process("embedded", settings)
    async with Supervisor.of_environment() as supervisor:
        platform = EmbeddedPlatform(settings, supervisor)
        on_ready(await platform.start())
        try:
            await wait_for_stop(platform.tasks, supervisor)
        finally:
            log.info("draining: seal, upload, register, release")
            await asyncio.shield(platform.stop())
