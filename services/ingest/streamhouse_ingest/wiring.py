"""Builds the ingest agent; the only module that names the files of the log and the gRPC clients."""

from dataclasses import dataclass
from pathlib import Path

from shcluster.peers import Peers
from shproto.services import CoordinatorApi
from shproto.v1 import ingest_pb2
from shruntime import service
from shruntime.clock import Clock, SystemClock
from shruntime.service import Apis, ServiceContext
from shruntime.tasks import Tasks

from streamhouse_ingest.adapters.wal import FileBatchReader, FileWal
from streamhouse_ingest.adapters.wal_directory import WalDirectory
from streamhouse_ingest.adapters.wal_replay import replay_directory
from streamhouse_ingest.agent import Agent
from streamhouse_ingest.api import IngestApi
from streamhouse_ingest.ports import OpenedLog
from streamhouse_ingest.settings import IngestSettings

# Calls that still run after the drain are long polls, whose clients retry with another agent.
CALL_GRACE_MS = 500


@dataclass(frozen=True, slots=True)
class IngestService:
    """The ingest agent as a service. `api` answers Unavailable until `start` is done. `tasks.failed` is set if the
    agent cannot go on."""

    api: IngestApi
    agent: Agent

    @property
    def tasks(self) -> Tasks:
        return self.agent.tasks

    @property
    def apis(self) -> Apis:
        """RPC services of the process, with their names."""
        return [(ingest_pb2.DESCRIPTOR.services_by_name["Ingest"], self.api)]

    async def failed(self) -> None:
        """Waits for ever. Raises the error that ended a background task of the agent."""
        await self.tasks.raise_failure()

    async def start(self, advertised_address: str) -> None:
        """Locks and replays the log, opens the session, serves. Raises WalDirectoryError, AgentIdTaken, OSError."""
        await self.agent.start(advertised_address)

    async def stop(self) -> None:
        """Drains, then closes everything."""
        await self.agent.stop()


def build(settings: IngestSettings, coordinator: CoordinatorApi, clock: Clock | None = None) -> IngestService:
    """Returns the agent over `coordinator`, which is a client, or the service itself in the same process."""
    agent = Agent(settings, coordinator, clock or SystemClock(), lambda: open_log(settings))
    api = IngestApi(
        agent,
        requests_in_flight_max=settings.stream_requests_in_flight_max,
        bytes_in_flight_max=settings.stream_bytes_in_flight_max,
        connection_bytes_max=settings.connection_bytes_in_flight_max,
    )
    return IngestService(api, agent)


def open_log(settings: IngestSettings) -> OpenedLog:
    """Locks the directory, replays its files and returns the open log. Raises WalDirectoryError, OSError."""
    directory = WalDirectory.open(Path(settings.wal_dir), settings.agent_id)
    try:
        # Before the replay, which reads the whole log: a damaged note refuses the start at once.
        seen = directory.history()
        replayed = replay_directory(directory, settings.seal_bytes)
    except BaseException:
        # The lock ends with the failed start: another try in this process must get it.
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
    return OpenedLog(
        wal_id=directory.wal_id,
        replay=replayed.replay,
        index=replayed.index,
        wal=wal,
        reader=reader,
        seen=seen,
        unlock=directory.close,
    )


async def run(settings: IngestSettings) -> None:
    """Runs the ingest agent as a separate process until SIGINT or SIGTERM, then drains it.

    Raises the error that ended the agent otherwise: WalDirectoryError, WalDamaged, WalBroken, AgentIdTaken,
    ListenError, OSError.
    """

    def over_network(context: ServiceContext) -> IngestService:
        peers = Peers(settings.bootstrap, settings.rpc_timeout_ms, context.telemetry)
        context.close_at_end(peers.close)
        return build(settings, peers.coordinator)

    await service.run(settings, over_network, call_grace_ms=CALL_GRACE_MS)
