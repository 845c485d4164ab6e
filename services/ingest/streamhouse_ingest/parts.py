"""The parts of a running agent, put together once its log is open."""

from concurrent.futures import Executor
from dataclasses import dataclass

from shproto.services import CoordinatorApi
from shruntime.clock import Clock
from shruntime.memory import MIB
from shruntime.tasks import Backoff, Tasks

from streamhouse_ingest.leadership.event_feed import EventFeed
from streamhouse_ingest.leadership.grants import Grants
from streamhouse_ingest.leadership.heartbeats import Heartbeats
from streamhouse_ingest.leadership.moves import Moves
from streamhouse_ingest.leadership.ranges import Ranges
from streamhouse_ingest.leadership.session import Identity, Session
from streamhouse_ingest.log.history import History
from streamhouse_ingest.log.lease import Lease
from streamhouse_ingest.log.logs import Logs
from streamhouse_ingest.log.session_id import CurrentSession
from streamhouse_ingest.log.trimmer import Trimmer
from streamhouse_ingest.log.wal_space import WalSpace
from streamhouse_ingest.metrics import IngestMetrics
from streamhouse_ingest.ports import OpenedLog
from streamhouse_ingest.produce.service import ProduceService
from streamhouse_ingest.produce.topics import TopicLookup
from streamhouse_ingest.produce.writer import Writer, WriterLimits
from streamhouse_ingest.reading.damage import Damage
from streamhouse_ingest.reading.tail import TailReader
from streamhouse_ingest.sealing.sealer import Sealer
from streamhouse_ingest.sealing.sealing import SealLimits
from streamhouse_ingest.settings import IngestSettings

# One segmenter builds an object in memory: the largest sealed buffer there may be.
_OBJECT_BYTES_MAX = 256 * MIB


@dataclass(frozen=True, slots=True)
class AgentContext:
    """What all parts share and none of them owns."""

    settings: IngestSettings
    coordinator: CoordinatorApi
    clock: Clock
    metrics: IngestMetrics
    tasks: Tasks
    thread: Executor

    def backoff(self) -> Backoff:
        return Backoff(self.settings.retry_first_ms, self.settings.retry_max_ms)


@dataclass(frozen=True, slots=True)
class AgentParts:
    """Everything that exists once the log is open."""

    opened: OpenedLog
    logs: Logs
    writer: Writer
    sealer: Sealer
    session: Session
    holder: CurrentSession
    grants: Grants
    ranges: Ranges
    moves: Moves
    trimmer: Trimmer
    produce: ProduceService
    tail: TailReader


def assemble(around: AgentContext, opened: OpenedLog, logs: Logs, address: str) -> AgentParts:
    """Makes and connects the parts; starts nothing."""
    settings = around.settings
    holder, lease = CurrentSession(), Lease(settings.lease_margin_ms)
    sealer = Sealer(
        logs, around.coordinator, holder, around.clock, _seal_limits(settings), around.backoff(), around.metrics
    )
    room = WalSpace(opened.wal, around.thread, around.clock, around.tasks, grace_ms=settings.wal_full_grace_ms)
    writer = _writer(around, opened, logs, lease, room)
    history = History(opened.seen, opened.wal, around.thread)
    trimmer = Trimmer(logs, opened.wal, opened.index, around.thread, history)
    moves = _moves(around, logs, writer, sealer, holder)
    ranges = Ranges(logs, writer, moves, around.metrics, trimmer.want)
    identity = Identity(settings.agent_id, opened.wal_id, address)
    grants = Grants(around.coordinator, ranges, holder, history, around.clock, around.backoff)
    feed = EventFeed(
        settings.agent_id,
        around.coordinator,
        holder,
        logs,
        ranges,
        sealer,
        grants,
        history,
        around.clock,
        around.backoff,
    )
    heartbeats = Heartbeats(
        around.coordinator, holder, lease, logs, ranges, grants, feed, history, room, around.clock, around.backoff
    )
    session = Session(
        identity,
        around.coordinator,
        heartbeats,
        feed,
        grants,
        ranges,
        moves,
        logs,
        writer,
        sealer,
        lease,
        holder,
        around.clock,
        around.backoff,
        opened.replay.doubt,
        history,
    )
    logs.subscribe(sealer.appended)
    logs.subscribe(heartbeats.appended)
    topics = TopicLookup(logs, around.coordinator, around.clock, settings.agent_id, grants.take_in)
    produce = ProduceService(logs, writer, topics, around.clock, settings, around.metrics)
    damage = Damage(logs, opened.reader, sealer, around.metrics, grants.want_all)
    tail = _tail(around, opened, logs, damage)
    return AgentParts(opened, logs, writer, sealer, session, holder, grants, ranges, moves, trimmer, produce, tail)


def _writer(around: AgentContext, opened: OpenedLog, logs: Logs, lease: Lease, room: WalSpace) -> Writer:
    settings = around.settings
    limits = WriterLimits(
        queue_bytes_max=settings.queue_bytes_max,
        group_bytes_max=settings.wal_group_bytes_max,
        wal_bytes_max=settings.wal_bytes_max,
        wal_ahead_bytes=settings.space_ahead_bytes,
    )
    return Writer(logs, opened.wal, opened.index, lease, around.thread, around.clock, limits, around.metrics, room)


def _moves(around: AgentContext, logs: Logs, writer: Writer, sealer: Sealer, holder: CurrentSession) -> Moves:
    return Moves(
        logs,
        writer,
        sealer,
        around.coordinator,
        holder,
        around.clock,
        around.tasks,
        timeout_ms=around.settings.move_timeout_ms,
        make_backoff=around.backoff,
    )


def _tail(around: AgentContext, opened: OpenedLog, logs: Logs, damage: Damage) -> TailReader:
    settings = around.settings
    return TailReader(
        logs,
        opened.reader,
        damage,
        around.clock,
        bytes_max=settings.read_tail_bytes_max,
        wait_ms_max=settings.read_tail_wait_ms_max,
    )


def _seal_limits(settings: IngestSettings) -> SealLimits:
    return SealLimits(
        seal_bytes=settings.seal_bytes,
        seal_age_ms=settings.seal_age_ms,
        durable_linger_ms=settings.durable_linger_ms,
        open_bytes_max=settings.memory_bytes_max // 2,  # the other half is for what is sealed and being uploaded
        object_bytes_max=_OBJECT_BYTES_MAX,
    )
