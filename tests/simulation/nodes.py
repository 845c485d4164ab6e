"""The services as processes on machines of the simulation: built from their real parts, started, killed, restarted."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shproto.services import CoordinatorClient, IngestClient
from shproto.v1 import ingest_pb2
from shstore import MemoryStore
from streamhouse_coordinator.feed import Feed
from streamhouse_coordinator.service.common import Context
from streamhouse_coordinator.settings import CoordinatorSettings
from streamhouse_ingest import wiring as ingest_wiring
from streamhouse_ingest.settings import IngestSettings
from streamhouse_query import wiring as query_wiring
from streamhouse_query.settings import QuerySettings
from streamhouse_segmenter import wiring as segmenter_wiring
from streamhouse_segmenter.settings import SegmenterSettings

from tests.platform.coordinator import coordinator_over
from tests.simulation import cache
from tests.simulation.clock import SimClock
from tests.simulation.connection import SimConnection
from tests.simulation.database import Database, Listener, Session
from tests.simulation.disk import SimDisk
from tests.simulation.loop import Process, SimLoop
from tests.simulation.network import Network
from tests.simulation.store import StoreRates, store_of

PORT = 7000
RPC_TIMEOUT_MS = 2_000
SUPERVISOR_RESTART_S = 0.5
"""A process that ended by itself is started again after this, as a supervisor does."""


@dataclass(kw_only=True)
class SimContext:
    """What all nodes share."""

    loop: SimLoop
    network: Network
    database: Database
    objects: MemoryStore
    store_rates: StoreRates
    rng: random.Random
    log: Callable[[str, str], None]
    bootstrap: list[str] = field(default_factory=list)
    range_width_offsets: int = 64

    def coordinator(self) -> CoordinatorClient:
        return CoordinatorClient(self.connection(self.bootstrap))

    def ingest_at(self) -> Callable[[str], IngestClient]:
        return lambda address: IngestClient(self.connection([address]))

    def connection(self, addresses: list[str]) -> Any:
        return SimConnection(self.network, addresses, timeout_ms=RPC_TIMEOUT_MS)


class Node:
    """A machine with one service. `deaths`: processes that ended by themselves, and why."""

    kind = ""

    def __init__(self, context: SimContext, name: str) -> None:
        self.context = context
        self.name = name
        self.address = f"{name}:{PORT}"
        self.clock = SimClock(context.loop)
        self.process: Process | None = None
        self.service: Any = None
        self.deaths: list[str] = []
        self.wanted = False
        self.stopping = False
        self.dies_at_step: int | None = None  # of its next process

    @property
    def up(self) -> bool:
        return self.process is not None and self.process.alive

    def start(self) -> None:
        """Starts a process; it serves when its start-up is through."""
        assert not self.up
        self.wanted, self.stopping = True, False
        self.process = Process(self.context.loop, self.name)
        self.process.steps_left, self.dies_at_step = self.dies_at_step, None
        self.context.log(self.name, "starts")
        self.process.spawn(self._live(self.process), name=f"main of {self.name}")

    async def _live(self, process: Process) -> None:
        try:
            await self.serve(process)
        except Exception as error:  # noqa: BLE001 - what ends a process, as its exit code would
            why = f"{type(error).__name__}: {error}"
            self.context.log(self.name, f"ends by itself: {why}")
            if not self.may_end_over(error):
                self.deaths.append(why)
        else:
            self.context.log(self.name, "stopped")
        self.crash(process)
        self.context.network.later(SUPERVISOR_RESTART_S, self.restart)

    def may_end_over(self, error: Exception) -> bool:
        """Whether there is nothing better to do, whatever the faults."""
        return False

    def restart(self) -> None:
        if not self.up and self.wanted:
            self.start()

    def kill(self) -> None:
        """SIGKILL: the machine stays."""
        if self.process is not None and self.process.alive:
            self.context.log(self.name, "is killed")
            self.wanted = False
            self.crash(self.process)

    def crash(self, process: Process) -> None:
        """The process is gone."""
        process.die()

    def lose_power(self) -> None:
        """The machine goes off: what was not synced is left to chance."""
        self.kill()

    def stop(self) -> None:
        """SIGTERM: drains, then ends; a second one changes nothing (shruntime.tasks.wait_for_stop)."""
        if self.process is not None and self.process.alive and self.service is not None and not self.stopping:
            self.context.log(self.name, "is told to stop")
            self.wanted, self.stopping = False, True
            process, service = self.process, self.service
            self.process.spawn(self._stop(process, service), name=f"stop of {self.name}")

    async def _stop(self, process: Process, service: Any) -> None:
        try:
            await service.stop()
        except Exception as error:  # noqa: BLE001 - as above
            self.context.log(self.name, f"stop failed: {type(error).__name__}: {error}")
            self.deaths.append(f"stop: {type(error).__name__}: {error}")
        self.context.log(self.name, "stopped")
        self.crash(process)
        self.context.network.later(SUPERVISOR_RESTART_S, self.restart)

    async def serve(self, process: Process) -> None:
        """Builds the service, starts it, and returns or raises when it ends."""
        raise NotImplementedError


class CoordinatorNode(Node):
    kind = "coordinator"

    async def serve(self, process: Process) -> None:
        settings = CoordinatorSettings.load(
            {},
            coordinator_id=self.name,
            session_ttl_ms=2_500,
            heartbeat_interval_ms=800,
            pg_timeout_ms=500,
            pg_transaction_idle_ms=500,
            session_sweep_interval_ms=500,
            probe_timeout_ms=500,
            events_poll_interval_ms=1_000,
            range_width_offsets=self.context.range_width_offsets,
            group_session_timeout_ms=3_000,
            group_heartbeat_interval_ms=1_000,
            cut_off_after_ms=3_000,
            cut_off_hold_ms=4_000,
        )
        # More than an operator may set: so that leases end over outages that are not made up for.
        settings = settings.model_copy(update={"session_sweep_interval_ms": 700})
        service = coordinator_over(
            Session(self.context.database, self.name),
            settings,
            self._listen,
            self._describe_agent,
            events_batch=50,
            events_cached=40,
        )
        self.context.network.listen(self.address, process, service.api)
        self.service = service
        await service.start()
        await service.open_session(self.address)
        self.context.log(self.name, "serves")
        await service.failed()

    def _listen(self, feed: Feed, context: Context) -> Listener:
        return Listener(
            self.context.database,
            self.name,
            events_changed=feed.wake,
            group_changed=context.waiters.changed,
            buffer_sealed=feed.sealed,
        )

    async def _describe_agent(self, address: str) -> Any:
        return await self.context.ingest_at()(address).describe_agent(ingest_pb2.DescribeAgentRequest())


class IngestNode(Node):
    kind = "ingest"

    def __init__(self, context: SimContext, name: str) -> None:
        super().__init__(context, name)
        self.disk = SimDisk(name=name, rng=context.rng)

    def may_end_over(self, error: Exception) -> bool:
        """A full disk is no reason once there is a log, which could be given away (G7)."""
        return isinstance(error, OSError) and error.errno == errno.ENOSPC and "identity" not in self.disk.files

    async def serve(self, process: Process) -> None:
        settings = IngestSettings.load(
            {},
            agent_id=self.name,
            wal_dir=f"/{self.name}",
            wal_file_bytes=64 * 1024,
            wal_bytes_max=256 * 1024,
            wal_group_bytes_max=64 * 1024,
            queue_bytes_max=64 * 1024,
            batch_bytes_max=16 * 1024,
            memory_bytes_max=1024 * 1024,
            tail_cache_bytes=self.context.rng.choice((0, 4 * 1024, 64 * 1024)),
            seal_bytes=64 * 1024,
            seal_age_ms=400,
            durable_linger_ms=20,
            lease_margin_ms=300,
            move_timeout_ms=1_500,
            shutdown_timeout_ms=2_000,
            retry_max_ms=1_000,
            rpc_timeout_ms=RPC_TIMEOUT_MS,
        )
        # Less than an operator may set: so that files of the log are full, and go, within a run.
        wal_file_bytes = self.context.rng.choice((2, 8, 64)) * 1024
        wal_ahead_bytes = self.context.rng.choice((0, 16)) * 1024
        settings = settings.model_copy(update={"wal_file_bytes": wal_file_bytes, "wal_ahead_bytes": wal_ahead_bytes})
        service = ingest_wiring.build(settings, self.context.coordinator(), self.clock)
        self.context.network.listen(self.address, process, service.api)
        self.service = service
        await service.start(self.address)
        self.context.log(self.name, "serves")
        await service.tasks.failed.wait()
        assert service.tasks.error is not None
        raise service.tasks.error

    def crash(self, process: Process) -> None:
        super().crash(process)
        self.disk.killed(process)

    def lose_power(self) -> None:
        self.kill()
        self.disk.lose_power()

    def describe(self) -> int:
        """Bytes that are not registered. Raises StreamHouseError while it starts."""
        assert self.service is not None
        return int(self.service.agent.describe().unregistered_bytes)


class SegmenterNode(Node):
    kind = "segmenter"

    async def serve(self, process: Process) -> None:
        settings = SegmenterSettings.load(
            {},
            worker_id=self.name,
            scan_interval_ms=1_000,
            segment_build_bytes_max=1024 * 1024,
            handover_retry_first_ms=50,
            handover_retry_max_ms=1_000,
            early_wait_ms_max=2_000,
            compaction_interval_ms=1_500,
            compaction_segments_min=4,
            retention_interval_ms=3_000,
            orphan_sweep_interval_ms=1_500,
            orphan_grace_ms=4_000,
            orphan_confirm_ms=1_000,
            shutdown_timeout_ms=2_000,
            rpc_timeout_ms=RPC_TIMEOUT_MS,
        )
        # Less than an operator may set: so that claims end under their work.
        settings = settings.model_copy(update={"claim_ttl_ms": 2_000})
        context = self.context
        store = store_of(context.objects, context.network, self.name, context.store_rates, context.rng, context.loop)
        service = segmenter_wiring.build(settings, context.coordinator(), store, context.ingest_at(), self.clock)
        self.service = service
        await service.start(self.address)
        context.log(self.name, "serves")
        await service.tasks.failed.wait()
        assert service.tasks.error is not None
        raise service.tasks.error


class QueryNode(Node):
    kind = "query"

    async def serve(self, process: Process) -> None:
        settings = QuerySettings.load(
            {},
            agent_id=self.name,
            cache_dir=Path(f"/cache/{self.name}"),
            cache_bytes_max=1024 * 1024,
            cache_chunk_bytes=64 * 1024,
            catch_up_ms=1_000,
            rpc_timeout_ms=RPC_TIMEOUT_MS,
        )
        context = self.context
        store = store_of(context.objects, context.network, self.name, context.store_rates, context.rng, context.loop)
        service = query_wiring.build(settings, context.coordinator(), store, context.ingest_at(), self.clock)
        context.network.listen(self.address, process, service.api)
        self.service = service
        await service.start(self.address)
        context.log(self.name, "serves")
        await service.tasks.failed.wait()
        assert service.tasks.error is not None
        raise service.tasks.error

    def lose_power(self) -> None:
        self.kill()
        cache.lose_power(f"/cache/{self.name}", self.context.rng)


KINDS: tuple[type[Node], ...] = (CoordinatorNode, IngestNode, SegmenterNode, QueryNode)
