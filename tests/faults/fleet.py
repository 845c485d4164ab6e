"""The system under test: processes of every service, a proxy in every connection between them, and their servers.

Owns: what runs, what should run, and the links. Does not own: which fault happens when (nemesis.py).
"""

import asyncio
import functools
import resource
import shutil
import signal
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tests.faults import shim
from tests.faults.history import ProcessDied, Recorder
from tests.faults.postgres_proxy import PostgresErrors, PostgresSession
from tests.faults.proxy import FaultProxy
from tests.faults.store_proxy import StoreProxy
from tests.integration import servers, small_disk
from tests.integration.processes import ServiceProcess, free_ports, is_serving
from tests.integration.standby import postgres_pair

ResultT = TypeVar("ResultT")

COORDINATORS = ("coordinator-1", "coordinator-2")
AGENTS = ("ingest-1", "ingest-2", "ingest-3")
QUERIES = ("query-1", "query-2")
SEGMENTERS = ("segmenter-1", "segmenter-2")
SERVICES = (*COORDINATORS, *AGENTS, *QUERIES, *SEGMENTERS)
CLIENTS = "clients"
"""All clients of a run are in one process, and so behind the same links."""

POSTGRES_PLACES = ("postgres-1", "postgres-2")
"""One of them has the primary at a time."""

CALLERS = {
    AGENTS: (CLIENTS, *COORDINATORS, *QUERIES, *SEGMENTERS),
    QUERIES: (CLIENTS,),
    COORDINATORS: (CLIENTS, *AGENTS, *QUERIES, *SEGMENTERS),
    POSTGRES_PLACES: COORDINATORS,
    ("s3",): (*QUERIES, *SEGMENTERS),
    ("rabbitmq",): (*COORDINATORS, *SEGMENTERS),
    ("redis",): QUERIES,
}
"""Who calls whom."""

WAYS = tuple(f"{caller}>{name}" for names, callers in CALLERS.items() for name in names for caller in callers)
"""The names of all links."""

SMALL_DISK_AGENT = AGENTS[-1]
SMALL_DISK_BYTES = 48 * 1024 * 1024
"""Holds what an agent may write in a run of the usual rate between two registrations many times over."""

POSTGRES_DISK_BYTES = 1024 * 1024 * 1024
"""Two clusters with as much of their log as they keep (max_wal_size) fit in."""

DESCRIPTORS_MAX = 1024
"""Of each service: what most systems give to a process."""

SESSION_TTL_S = 6
SUPERVISOR_INTERVAL_S = 0.2
RESTART_PAUSE_S = 1.0
SERVING_TIMEOUT_S = 240
"""After a power cut everything starts at once, while PostgreSQL recovers; a busy machine has taken a minute for it."""

SETTINGS = {
    # Short leases, so that a run sees many of them end.
    "SESSION_TTL_MS": SESSION_TTL_S * 1000,
    "HEARTBEAT_INTERVAL_MS": 2000,
    "LEASE_MARGIN_MS": 1500,
    # An agent that its workers do not reach gives its partitions up, and has them back, within a fault.
    "CUT_OFF_AFTER_MS": 5000,
    "CUT_OFF_HOLD_MS": 5000,
    "RPC_TIMEOUT_MS": 3000,
    "PG_TIMEOUT_MS": 1200,
    "PG_TRANSACTION_IDLE_MS": 1200,
    "GROUP_SESSION_TIMEOUT_MS": 6000,
    "GROUP_HEARTBEAT_INTERVAL_MS": 1000,
    # Ranges run out and are extended within a run.
    "RANGE_WIDTH_OFFSETS": 4000,
    # Many small segments, merged soon.
    "SEAL_AGE_MS": 1000,
    "SEAL_BYTES": 256 * 1024,
    "WAL_FILE_BYTES": 1024 * 1024,
    "WAL_BYTES_MAX": 32 * 1024 * 1024,
    "SCAN_INTERVAL_MS": 1000,
    "CLAIM_TTL_MS": 6000,
    "HANDOVER_RETRY_MAX_MS": 2000,
    "EARLY_WAIT_MS_MAX": 6000,
    "COMPACTION_INTERVAL_MS": 5000,
    "COMPACTION_SEGMENTS_MIN": 4,
    # Orphans are looked for all the time, and deleted as soon as no fault can hold up a registration for so long.
    "ORPHAN_SWEEP_INTERVAL_MS": 4000,
    "ORPHAN_GRACE_MS": 30_000,
    "ORPHAN_CONFIRM_MS": 5000,
    "S3_CONNECT_TIMEOUT_MS": 1000,
    "S3_READ_TIMEOUT_MS": 3000,
    "S3_ATTEMPTS_DEADLINE_MS": 5000,
    "SHUTDOWN_TIMEOUT_MS": 20_000,
    # Small caches: what is read again comes from the object store.
    "CACHE_BYTES_MAX": 1024 * 1024,
    "CACHE_CHUNK_BYTES": 64 * 1024,
    "REDIS_TTL_S": 2,
}
"""Of all services, with STREAMHOUSE_ in front."""

SWEEPING = {
    "COMPACTION_INTERVAL_MS": 86_400_000,
    "ORPHAN_SWEEP_INTERVAL_MS": 1000,
    "ORPHAN_GRACE_MS": 1000,
    "ORPHAN_CONFIRM_MS": 500,
}
"""Of the segmenters after the run: nothing is uploaded any more, so an hour's grace can be a second."""


def place_of(url: str) -> str:
    """host:port of a URL; several, separated by commas, of a PostgreSQL's."""
    return url.partition("://")[2].rpartition("@")[2].partition("/")[0]


def _variables(settings: Mapping[str, object]) -> dict[str, str]:
    return {f"STREAMHOUSE_{name}": str(value) for name, value in settings.items()}


async def in_thread(call: Callable[..., ResultT], *arguments: object) -> ResultT:
    """Returns what a blocking call returns. A thread cannot be stopped, so a cancellation waits for its end: else it
    would start what `Fleet.close` has closed."""
    running = asyncio.create_task(asyncio.to_thread(call, *arguments), name=f"thread of {call!r}")
    try:
        return await asyncio.shield(running)
    finally:
        await asyncio.wait([running])


class FleetProcess(ServiceProcess):
    def start(self) -> None:
        super().start()
        resource.prlimit(self.pid, resource.RLIMIT_NOFILE, (DESCRIPTORS_MAX, DESCRIPTORS_MAX))

    @property
    def exit_code(self) -> int:
        """Of a process that has ended."""
        assert self._process is not None and self._process.returncode is not None, f"{self.name} has not ended"
        return self._process.returncode


@dataclass
class Member:
    """One service process. wanted: it should run. may_die: a fault is on that may end it. has_served: since it was
    started last; before, it may end because it does not find what it needs, and is started again."""

    name: str
    process: FleetProcess
    listen: str
    control: shim.Control
    wanted: bool = False
    may_die: bool = False
    has_served: bool = False


class Fleet:
    """`start` returns when everything serves; `heal` when it does again. Links are named FROM>TO, one for each pair of
    processes that talk to each other."""

    def __init__(self, work_dir: Path, recorder: Recorder) -> None:
        self.work_dir = work_dir
        self.recorder = recorder
        self.links: dict[str, FaultProxy] = {}
        self.members: dict[str, Member] = {}
        self.servers: dict[str, servers.Server] = {}
        self.store: StoreProxy | None = None
        self.postgres_errors = PostgresErrors()
        self.postgres_control: shim.Control | None = None
        self.busy: set[str] = set()
        self.turns: dict[str, list[int]] = {}
        self.small_disk: Path | None = None
        self.library: Path | None = None
        self._supervisor: asyncio.Task[None] | None = None

    # ---- start

    async def start(self) -> None:
        self.library = await asyncio.to_thread(shim.build, self.work_dir)
        await self._start_servers()
        self._mount_small_disk()
        listens = dict(zip(SERVICES, (f"127.0.0.1:{port}" for port in free_ports(len(SERVICES))), strict=True))
        await self._make_links(listens)
        for name in SERVICES:
            self._add(name, listens[name])
        await asyncio.gather(*(self.start_process(name) for name in SERVICES))
        self._supervisor = asyncio.create_task(self._supervise(), name="supervisor")

    async def _start_servers(self) -> None:
        makers: dict[str, Callable[[], servers.Server]] = {
            "postgres": functools.partial(postgres_pair, POSTGRES_DISK_BYTES, self._postgres_variables),
            "s3": servers.s3_server,
            "rabbitmq": servers.rabbitmq_server,
            "redis": servers.redis_server,
        }
        for name, make in makers.items():
            await in_thread(self._add_server, name, make)

    def _add_server(self, name: str, make: Callable[[], servers.Server]) -> None:
        self.servers[name] = make()

    def _postgres_variables(self, directory: Path) -> Mapping[str, str]:
        """PostgreSQL may be another user: what it loads lies in its own directory."""
        if self.library is None:
            return {}
        self.postgres_control = shim.Control(directory / "control")
        return self.postgres_control.environ(Path(shutil.copy(self.library, directory)))

    def _mount_small_disk(self) -> None:
        path = self.work_dir / SMALL_DISK_AGENT
        path.mkdir(exist_ok=True)
        if small_disk.mount(path, SMALL_DISK_BYTES):
            self.small_disk = path

    async def _make_links(self, listens: Mapping[str, str]) -> None:
        servers_at = {name: place_of(server.url) for name, server in self.servers.items()}
        self.store = StoreProxy(servers_at["s3"])
        await self.store.start()
        targets = {**listens, **servers_at, **self._postgres_places(), "s3": self.store.address}
        for way in WAYS:
            target = way.partition(">")[2]
            session = functools.partial(PostgresSession, self.postgres_errors) if target in POSTGRES_PLACES else None
            link = self.links[way] = FaultProxy(way, targets[target], session)
            await link.start()

    def _postgres_places(self) -> dict[str, str]:
        return dict(zip(POSTGRES_PLACES, place_of(self.servers["postgres"].url).split(","), strict=True))

    def links_to(self, name: str) -> list[FaultProxy]:
        return [link for way, link in self.links.items() if way.endswith(f">{name}")]

    def bootstrap(self, client: str = CLIENTS) -> str:
        """The coordinators, as `client` reaches them: half of the services ask the second one first."""
        names = COORDINATORS if client not in SERVICES or SERVICES.index(client) % 2 else COORDINATORS[::-1]
        return ",".join(self.links[f"{client}>{name}"].address for name in names)

    def _add(self, name: str, listen: str) -> None:
        control = shim.Control(self.work_dir / f"{name}.control")
        environ = _variables(SETTINGS) | {"STREAMHOUSE_LISTEN": listen} | self._environ_of(name)
        if self.library is not None:
            environ |= control.environ(self.library, self._routes_of(name))
        service = name.partition("-")[0]
        process = FleetProcess(name, [service], environ, self.work_dir)
        self.members[name] = Member(name, process, listen, control)

    def _routes_of(self, name: str) -> dict[str, str]:
        """An agent tells everybody the same address, the clients' link to it: others are led to links of their own."""
        own = {agent: self.links[f"{name}>{agent}"] for agent in AGENTS if f"{name}>{agent}" in self.links}
        return {self.links[f"{CLIENTS}>{agent}"].address: link.address for agent, link in own.items()}

    def _environ_of(self, name: str) -> dict[str, str]:
        own = {key: value for server in self.servers.values() for key, value in server.settings.items()}
        for server in self.servers:
            if link := self.links.get(f"{name}>{server}"):
                place = place_of(self.servers[server].url)
                own = {key: value.replace(place, link.address) for key, value in own.items()}
        if name in COORDINATORS:
            dsn = self.servers["postgres"].url
            for place, address in self._postgres_places().items():
                dsn = dsn.replace(address, self.links[f"{name}>{place}"].address)
            return own | {"STREAMHOUSE_PG_DSN": dsn}
        own["STREAMHOUSE_BOOTSTRAP"] = self.bootstrap(name)
        if f"{CLIENTS}>{name}" in self.links:
            own["STREAMHOUSE_ADVERTISE"] = self.links[f"{CLIENTS}>{name}"].address
        specific = {
            "ingest": {"STREAMHOUSE_AGENT_ID": name, "STREAMHOUSE_WAL_DIR": str(self.work_dir / name / "wal")},
            "query": {"STREAMHOUSE_AGENT_ID": name, "STREAMHOUSE_CACHE_DIR": str(self.work_dir / name)},
            "segmenter": {"STREAMHOUSE_WORKER_ID": name},
        }
        return own | specific[name.partition("-")[0]]

    # ---- processes

    def running(self, names: Iterable[str]) -> list[str]:
        """Those that no fault is at."""
        return [name for name in names if self.members[name].wanted and name not in self.busy]

    async def start_process(self, name: str) -> None:
        """Returns when it serves."""
        member = self.members[name]
        for link in self.links_to(name):
            await link.accept()
        self._launch(member)
        member.wanted = True
        await self.until_serving(name)

    def _launch(self, member: Member) -> None:
        member.has_served = False
        member.process.start()

    async def until_serving(self, name: str) -> None:
        """Whatever ended it: the supervisor starts it again. Raises TimeoutError."""
        member = self.members[name]
        async with asyncio.timeout(SERVING_TIMEOUT_S):
            while not (member.process.is_running() and await is_serving(member.listen)):
                await asyncio.sleep(SUPERVISOR_INTERVAL_S)
        member.has_served = True

    async def kill(self, name: str) -> None:
        """SIGKILL; its port refuses then, through the proxy as well."""
        member = self.members[name]
        member.wanted = False
        if member.process.is_running():
            await asyncio.to_thread(member.process.kill)
        for link in self.links_to(name):
            await link.refuse()

    async def stop_process(self, name: str) -> None:
        """SIGTERM and the drain; a code other than 0 is an anomaly."""
        member = self.members[name]
        member.wanted = False
        if member.process.is_running():
            code = await member.process.stop()
            if code:
                self.recorder.write(ProcessDied(name, code))
        for link in self.links_to(name):
            await link.refuse()

    def send_signal(self, name: str, number: signal.Signals) -> None:
        if self.members[name].process.is_running():
            self.members[name].process.send_signal(number)

    async def _supervise(self) -> None:
        """Starts what ended by itself again, as systemd or Kubernetes would."""
        while True:
            await asyncio.sleep(SUPERVISOR_INTERVAL_S)
            for member in self.members.values():
                if member.wanted and not member.process.is_running():
                    self._note_death(member)
                    await asyncio.sleep(RESTART_PAUSE_S)
                    if member.wanted:
                        self._launch(member)

    def _note_death(self, member: Member) -> None:
        code = member.process.exit_code
        if member.may_die or not member.has_served:
            self.recorder.note(member.name, f"ended with exit code {code}")
        else:
            self.recorder.write(ProcessDied(member.name, code))

    # ---- the end

    async def heal(self) -> None:
        """Everything runs, every link passes."""
        for link in self.links.values():
            await link.heal()
        if self.store is not None:
            self.store.heal()
        self.postgres_errors.heal()
        if self.postgres_control is not None:
            self.postgres_control.heal()
        for name, server in self.servers.items():
            if not server.is_running:
                self.recorder.note("run", f"starts {name} again")
                await in_thread(server.start)
        for member in self.members.values():
            member.control.heal()
            member.may_die = False
            self.send_signal(member.name, signal.SIGCONT)
            if not member.wanted:
                await self.start_process(member.name)
        for name in self.members:
            await self.until_serving(name)

    async def sweep(self) -> None:
        """Segmenters that delete orphans soon, and merge nothing."""
        for name in SEGMENTERS:
            await self.stop_process(name)
            self.members[name].process.environ |= _variables(SWEEPING)
            await self.start_process(name)

    async def stop(self) -> None:
        """In order, coordinators last; the rest by force."""
        try:
            for name in (*AGENTS, *QUERIES, *SEGMENTERS, *COORDINATORS):
                await self.stop_process(name)
        finally:
            await self.close()

    async def close(self) -> None:
        """Ends whatever is left, by force; nothing outlives it."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor])
            if not self._supervisor.cancelled():
                self._supervisor.result()
            self._supervisor = None
        for member in self.members.values():
            member.wanted = False
            if member.process.is_running():
                await asyncio.to_thread(member.process.kill)
        for link in self.links.values():
            await link.stop()
        if self.store is not None:
            await self.store.stop()
        while self.servers:
            await asyncio.to_thread(self.servers.popitem()[1].close)
        if self.small_disk is not None:
            path, self.small_disk = self.small_disk, None
            await asyncio.to_thread(small_disk.unmount, path)
