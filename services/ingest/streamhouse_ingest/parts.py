"""Assembles the parts of a running agent, once its log is open."""

from concurrent.futures import Executor
from dataclasses import dataclass

from shproto.services import CoordinatorApi
from shruntime.clock import Clock
from shruntime.memory import MIB
from shruntime.tasks import Backoff, Tasks

from streamhouse_ingest.leadership.context import Identity, LeadershipContext
from streamhouse_ingest.leadership.fencing import FenceService
from streamhouse_ingest.leadership.grants import Grants
from streamhouse_ingest.leadership.ranges import Ranges
from streamhouse_ingest.leadership.session import Session
from streamhouse_ingest.leadership.transfers import LeadershipTransfers
from streamhouse_ingest.log.history import History
from streamhouse_ingest.log.lease import Lease
from streamhouse_ingest.log.logs import Logs
from streamhouse_ingest.log.session_id import CurrentSession
from streamhouse_ingest.log.trimmer import Trimmer
from streamhouse_ingest.log.wal_space import WalSpace
from streamhouse_ingest.metrics import IngestMetrics
from streamhouse_ingest.ports import LogFiles, OpenedLog
from streamhouse_ingest.produce.request_rules import RequestRules
from streamhouse_ingest.produce.service import ProduceService
from streamhouse_ingest.produce.topics import TopicLookup
from streamhouse_ingest.produce.writer import Writer, WriterLimits
from streamhouse_ingest.reading.corrupt_batches import CorruptBatches
from streamhouse_ingest.reading.tail import TailReader
from streamhouse_ingest.sealing.sealer import Sealer
from streamhouse_ingest.sealing.sealing import SealLimits
from streamhouse_ingest.settings import IngestSettings

# Limit of an object, and so of an announcement, because a segmenter builds an object in memory.
_OBJECT_BYTES_MAX = 256 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentContext:
    """Settings, clock, clients and metrics that all parts share and no part owns."""

    settings: IngestSettings
    coordinator: CoordinatorApi
    clock: Clock
    metrics: IngestMetrics
    tasks: Tasks
    thread: Executor

    def backoff(self) -> Backoff:
        """Returns a new back-off with the configured limits."""
        # One for each series of tries: if calls shared it, failures of one would delay the others.
        return Backoff(self.settings.retry_first_ms, self.settings.retry_max_ms)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentParts:
    """The parts that exist once the log is open."""

    opened: OpenedLog
    logs: Logs
    writer: Writer
    sealer: Sealer
    session: Session
    current_session: CurrentSession
    grants: Grants
    ranges: Ranges
    transfers: LeadershipTransfers
    trimmer: Trimmer
    produce: ProduceService
    fencing: FenceService
    tail: TailReader


def assemble(context: AgentContext, opened: OpenedLog, logs: Logs, address: str) -> AgentParts:
    """Creates and connects the parts and returns them; starts no task."""
    settings, tasks = context.settings, context.tasks
    files = LogFiles(opened.wal, opened.index, context.thread)
    current = CurrentSession()
    leadership = LeadershipContext(
        identity=Identity(settings.agent_id, opened.wal_id, address),
        coordinator=context.coordinator,
        clock=context.clock,
        session=current,
        lease=Lease(settings.lease_margin_ms),
        history=History(opened.seen, files, tasks),
        metrics=context.metrics,
        backoff=context.backoff,
    )
    sealer = Sealer(
        logs, context.coordinator, current, context.clock, _seal_limits(settings), context.backoff(), context.metrics
    )
    space = WalSpace(files, context.clock, tasks, grace_ms=settings.wal_full_grace_ms)
    writer = Writer(logs, files, leadership.lease, context.clock, _writer_limits(settings), context.metrics, space)
    trimmer = Trimmer(logs, files, leadership.history)
    transfers = LeadershipTransfers(leadership, logs, writer, sealer, tasks, timeout_ms=settings.move_timeout_ms)
    ranges = Ranges(logs, writer, transfers, context.metrics, trimmer.request)
    session = Session(leadership, logs, writer, sealer, ranges, transfers, space)
    # Subscribers, because log/ imports neither sealing/ nor leadership/, which import log/.
    logs.subscribe(sealer.appended)
    logs.subscribe(session.heartbeats.appended)
    grants = session.grants
    topics = TopicLookup(logs, context.coordinator, context.clock, settings.agent_id, grants.refresh)
    rules = RequestRules(logs, context.clock, settings)
    produce = ProduceService(logs, writer, topics, context.clock, settings, context.metrics, rules)
    fencing = FenceService(leadership, logs, writer, sealer, topics, rules)
    corrupt_batches = CorruptBatches(logs, opened.reader, sealer, context.metrics, grants.request_all)
    tail = _tail(context, opened, logs, corrupt_batches)
    return AgentParts(
        opened=opened,
        logs=logs,
        writer=writer,
        sealer=sealer,
        session=session,
        current_session=current,
        grants=grants,
        ranges=ranges,
        transfers=transfers,
        trimmer=trimmer,
        produce=produce,
        fencing=fencing,
        tail=tail,
    )


def _writer_limits(settings: IngestSettings) -> WriterLimits:
    return WriterLimits(
        queue_bytes_max=settings.queue_bytes_max,
        group_bytes_max=settings.wal_group_bytes_max,
        wal_bytes_max=settings.wal_bytes_max,
        wal_ahead_bytes=settings.space_ahead_bytes,
    )


def _tail(context: AgentContext, opened: OpenedLog, logs: Logs, corrupt_batches: CorruptBatches) -> TailReader:
    settings = context.settings
    return TailReader(
        logs,
        opened.reader,
        corrupt_batches,
        context.clock,
        bytes_max=settings.read_tail_bytes_max,
        wait_ms_max=settings.read_tail_wait_ms_max,
    )


def _seal_limits(settings: IngestSettings) -> SealLimits:
    return SealLimits(
        seal_bytes=settings.seal_bytes,
        seal_age_ms=settings.seal_age_ms,
        durable_linger_ms=settings.durable_linger_ms,
        open_bytes_max=settings.memory_bytes_max // 2,  # the other half is for sealed buffers that are being uploaded
        object_bytes_max=_OBJECT_BYTES_MAX,
    )
