"""Puts the ingest agent together: the only module that names the files of the log and the gRPC clients."""

import logging
from dataclasses import dataclass
from pathlib import Path

from shcluster.peers import Peers
from shproto.services import CoordinatorApi
from shproto.v1 import ingest_pb2
from shruntime.advertise import advertised_address
from shruntime.clock import Clock, SystemClock
from shruntime.descriptors import raise_descriptor_limit
from shruntime.logs import configure_logging
from shruntime.memory import give_back_freed_memory, log_memory_limits, spare_loaded_code
from shruntime.server import RpcServer, ServerLimits
from shruntime.supervisor import Supervisor
from shruntime.tasks import Tasks, wait_for_stop
from shruntime.telemetry import Telemetry

from streamhouse_ingest.adapters.wal import FileBatchReader, FileWal
from streamhouse_ingest.adapters.wal_directory import WalDirectory
from streamhouse_ingest.adapters.wal_replay import replay_directory
from streamhouse_ingest.agent import Agent
from streamhouse_ingest.api import IngestApi
from streamhouse_ingest.ports import OpenedLog
from streamhouse_ingest.settings import IngestSettings

log = logging.getLogger(__name__)

# Calls that still run when everything is drained are long polls; they retry elsewhere.
CALL_GRACE_MS = 500


@dataclass(frozen=True, slots=True)
class IngestService:
    """`api` answers Unavailable until `start` is done. `tasks.failed` is set when the agent cannot go on."""

    api: IngestApi
    agent: Agent

    @property
    def tasks(self) -> Tasks:
        return self.agent.tasks

    async def start(self, advertised_address: str) -> None:
        """Locks and replays the log, opens the session, serves. Raises WalDirectoryError, AgentIdTaken, OSError."""
        await self.agent.start(advertised_address)

    async def stop(self) -> None:
        """Drains, then closes everything."""
        await self.agent.stop()


def build(settings: IngestSettings, coordinator: CoordinatorApi, clock: Clock | None = None) -> IngestService:
    """The agent over whatever coordinator: a client, or the service itself in the same process."""
    agent = Agent(settings, coordinator, clock or SystemClock(), lambda: open_log(settings))
    api = IngestApi(
        agent,
        requests_in_flight_max=settings.stream_requests_in_flight_max,
        bytes_in_flight_max=settings.stream_bytes_in_flight_max,
        connection_bytes_max=settings.connection_bytes_in_flight_max,
    )
    return IngestService(api, agent)


def open_log(settings: IngestSettings) -> OpenedLog:
    """Locks the directory and replays its files. Raises WalDirectoryError, OSError."""
    directory = WalDirectory.open(Path(settings.wal_dir), settings.agent_id)
    try:
        seen = directory.history()
        replayed = replay_directory(directory, settings.seal_bytes)
    except BaseException:
        directory.close()
        raise
    wal = FileWal(
        directory,
        replayed.next_sequence,
        file_bytes=settings.wal_file_bytes,
        fsync_each=settings.wal_fsync == "always",
        previous_size_bytes=replayed.previous_size_bytes,
        ahead_bytes=settings.space_ahead_bytes,
    )
    reader = FileBatchReader(directory)
    return OpenedLog(directory.wal_id, replayed.replay, replayed.index, wal, reader, seen, directory.close)


async def run(settings: IngestSettings) -> None:
    """One ingest process: serves until SIGINT or SIGTERM, then drains. Raises what ended it otherwise."""
    configure_logging("ingest", settings)
    async with Supervisor.of_environment() as supervisor:
        await _run(settings, supervisor)


async def _run(settings: IngestSettings, supervisor: Supervisor) -> None:
    raise_descriptor_limit()
    give_back_freed_memory()
    spare_loaded_code()
    log_memory_limits(settings)
    telemetry = Telemetry.configure("ingest", settings)
    peers = Peers(settings.bootstrap, settings.rpc_timeout_ms, telemetry)
    service = build(settings, peers.coordinator)
    descriptor = ingest_pb2.DESCRIPTOR.services_by_name["Ingest"]
    apis, limits = [(descriptor, service.api)], ServerLimits.of(settings)
    server = RpcServer(settings.listen, apis, telemetry.server(), limits, supervisor)
    serving = Tasks()
    try:
        await server.start()
        log.info("listening on %s", server.address)
        serving.spawn("serve", _serve(service, server, settings))
        await wait_for_stop(serving, supervisor)
    finally:
        await server.set_serving(False)
        await serving.stop()
        await service.stop()
        await server.stop(CALL_GRACE_MS)
        await peers.close()
        telemetry.shutdown()


async def _serve(service: IngestService, server: RpcServer, settings: IngestSettings) -> None:
    """Starts, however long the coordinator takes; then raises what kills the agent, should anything."""
    await service.start(await advertised_address(settings, server.address))
    await server.set_serving(True)
    await service.tasks.failed.wait()
    assert service.tasks.error is not None, "failed means that there is an error"
    raise service.tasks.error
