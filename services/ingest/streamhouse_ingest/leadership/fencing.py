"""Fences producers in the partitions that the agent leads: FenceProducer.

Owns: the order of a fence's steps. Does not own: the fences (partition_log.py), their epochs (the coordinator), the
rules for batches (log/fences.py).
Invariants: a fence is answered only after the coordinator has its epoch, so that it holds whoever leads next, and after
the group that was being written is applied and synced: a batch of an older epoch is in the answer, or is refused.
Nothing is answered of a range whose end, or whose producers, are not known.
"""

from dataclasses import dataclass

from shformat.limits import INT64_MAX, UINT32_MAX
from shproto.acks import ACKS_DURABLE
from shproto.errors import Fenced, InvalidArgument, SessionExpired, Unavailable
from shproto.limits import RETRY_FIRST_MS, RETRY_MS_MAX
from shproto.v1 import coordinator_pb2, types_pb2
from shproto.v1 import ingest_pb2 as pb
from shruntime.tasks import Backoff, done_within

from streamhouse_ingest.leadership.context import LeadershipContext
from streamhouse_ingest.log.fences import latest, within
from streamhouse_ingest.log.logs import HeldLog, Logs, not_leader
from streamhouse_ingest.log.producers import (
    FIRST_EPOCH,
    ProducerState,
    SnapshotError,
    decode_snapshot,
    encode_snapshot,
)
from streamhouse_ingest.produce.leaders import leading_log
from streamhouse_ingest.produce.refusals import producer_fenced
from streamhouse_ingest.produce.request_rules import RequestRules
from streamhouse_ingest.produce.topics import TopicLookup
from streamhouse_ingest.produce.writer import Writer
from streamhouse_ingest.sealing.sealer import Sealer

# Longest wait of a request: the connection of a client that has gone away is held for no longer.
_WAIT_MS_MAX = 600_000


@dataclass(frozen=True, slots=True)
class _Known:
    """All that older ranges say of a producer; `state` None: it wrote nothing to them."""

    state: ProducerState | None


@dataclass(frozen=True, slots=True)
class _NotYet:
    """The answer has to wait; `reason` says for which range and agent."""

    reason: str


class FenceService:
    """Answers FenceProducer."""

    def __init__(
        self,
        context: LeadershipContext,
        logs: Logs,
        writer: Writer,
        sealer: Sealer,
        topics: TopicLookup,
        rules: RequestRules,
    ) -> None:
        self._context = context
        self._clock = context.clock
        self._logs = logs
        self._writer = writer
        self._sealer = sealer
        self._topics = topics
        self._rules = rules

    async def fence(self, request: pb.FenceProducerRequest) -> pb.FenceProducerResponse:
        """Returns what the producer wrote last, once older epochs are refused for good.

        Raises ProducerFenced, Unavailable if what older ranges hold is not known within max_wait_ms (with 0 the answer
        says so), NotLeader, Overloaded, DataLoss, and the errors of a request that names no partition of this agent.
        """
        _check_numbers(request)
        self._rules.check_producer_id(request.producer_id)
        held = await leading_log(self._logs, self._topics, request)
        acks = self._rules.acks(request, held)
        answer_by_ms = self._clock.monotonic_ms() + request.max_wait_ms
        known = await self._known_within(held, request, answer_by_ms)
        if isinstance(known, _NotYet):
            return _not_settled(held, request, known)
        state = await self._fence_here(held, request, known)
        if acks == ACKS_DURABLE and state is not None:
            waiting = await self._durable_within(held, state, answer_by_ms)
            if waiting is not None:
                return _not_settled(held, request, waiting)
        self._check_newest(held, request)
        held.log.open_fence(request.producer_id)
        return _answer(held, state)

    # ---- older ranges

    async def _known_within(
        self, held: HeldLog, request: pb.FenceProducerRequest, answer_by_ms: int
    ) -> _Known | _NotYet:
        """Registers the fence; returns all that older ranges say of the producer, asking again until the time is
        over."""
        backoff = Backoff(RETRY_FIRST_MS, RETRY_MS_MAX)
        while True:
            found = await self._register(held, request)
            left_ms = answer_by_ms - self._clock.monotonic_ms()
            if isinstance(found, _Known) or left_ms <= 0:
                return found
            await self._clock.sleep_ms(min(left_ms, int(backoff.next_ms()) + 1))

    async def _register(self, held: HeldLog, request: pb.FenceProducerRequest) -> _Known | _NotYet:
        """Registers the fence with the coordinator and gathers the states of older ranges, in as many answers as they
        fill. The coordinator keeps what was gathered: later ranges may hold nothing of it."""
        producer_id = request.producer_id
        known_epoch, state = 0, b""
        while True:
            answer = await self._ask(held, request, known_epoch, state)
            if answer.known_epoch == held.log.key.epoch:
                return _Known(_states(held, answer.state).get(producer_id))
            gathered = _gathered(held, producer_id, answer)
            if answer.next_epoch == answer.known_epoch:
                return _NotYet(_waiting_reason(held, answer.waits_for))
            known_epoch = answer.next_epoch
            state = b"" if gathered is None else encode_snapshot({producer_id: gathered})

    async def _ask(
        self, held: HeldLog, request: pb.FenceProducerRequest, known_epoch: int, state: bytes
    ) -> coordinator_pb2.RegisterFenceResponse:
        log = held.log
        try:
            return await self._context.coordinator.register_fence(
                coordinator_pb2.RegisterFenceRequest(
                    session_token=self._context.session.token,
                    topic_id=log.key.topic_id,
                    partition=log.key.partition,
                    epoch=log.key.epoch,
                    producer_id=request.producer_id,
                    producer_epoch=request.producer_epoch,
                    known_epoch=known_epoch,
                    state=state,
                )
            )
        except (Fenced, SessionExpired) as error:
            raise not_leader(log.topic, log.key.partition, "its lease has moved or run out") from error

    # ---- this range

    async def _fence_here(self, held: HeldLog, request: pb.FenceProducerRequest, known: _Known) -> ProducerState | None:
        """Refuses older epochs in this range, waits for what is being written, and returns the producer's state."""
        log = held.log
        newest = log.raise_fence(request.producer_id, request.producer_epoch)
        if newest > request.producer_epoch:
            raise producer_fenced(held, request.producer_id, request.producer_epoch, newest)
        # From here on no group is decided with an older epoch; one that was decided before counts.
        log.know(request.producer_id, known.state)
        await self._writer.sync()
        self._check_newest(held, request)
        return log.producers.get(request.producer_id)

    def _check_newest(self, held: HeldLog, request: pb.FenceProducerRequest) -> None:
        """Checks that this agent still leads and no newer epoch has fenced meanwhile. Raises NotLeader,
        ProducerFenced."""
        log = held.log
        leads = log.leading and self._context.lease.held(self._clock.monotonic_ms())
        if not leads or self._logs.led(log.topic, log.key.partition) is not held:
            raise not_leader(log.topic, log.key.partition, "its lease has moved or run out")
        newest = log.fences[request.producer_id].producer_epoch
        if newest > request.producer_epoch:
            raise producer_fenced(held, request.producer_id, request.producer_epoch, newest)

    # ---- durability

    async def _durable_within(self, held: HeldLog, state: ProducerState, answer_by_ms: int) -> _NotYet | None:
        """Waits until the producer's last batch is registered; returns the reason if it is not in time. Raises DataLoss
        if it was given up."""
        log, last = held.log, state.batches[-1]
        end_offset = last.base_offset + last.record_count
        reason = _NotYet(f"{log.describe()}: the last batch, up to offset {end_offset}, is not in the object store yet")
        for holder in self._logs.of_partition(*log.key.partition_key):
            if holder.log.start_offset <= last.base_offset < holder.log.next_offset:
                if holder.log.registered_end < end_offset:
                    self._sealer.seal_now([holder])
                registered = holder.wait_registered(end_offset)
                try:
                    left_ms = max(0, answer_by_ms - self._clock.monotonic_ms())
                    if not await done_within(self._clock, registered, left_ms):
                        return reason
                finally:
                    registered.cancel()
                if (error := registered.result()) is not None:
                    raise error
                return None
        backoff = Backoff(RETRY_FIRST_MS, RETRY_MS_MAX)
        while not await self._topics.is_registered(log, last.base_offset):
            left_ms = answer_by_ms - self._clock.monotonic_ms()
            if left_ms <= 0:
                return reason
            await self._clock.sleep_ms(min(left_ms, int(backoff.next_ms()) + 1))
        return None


def _check_numbers(request: pb.FenceProducerRequest) -> None:
    for field, value, least, most in (
        ("producer_id", request.producer_id, 1, INT64_MAX),
        ("producer_epoch", request.producer_epoch, FIRST_EPOCH + 1, UINT32_MAX),
        ("max_wait_ms", request.max_wait_ms, 0, _WAIT_MS_MAX),
    ):
        if not least <= value <= most:
            raise InvalidArgument(
                f"{field} is {value}, must be {least} to {most}", field=field, value=value, limit=f"{least}..{most}"
            )


def _gathered(held: HeldLog, producer_id: int, answer: coordinator_pb2.RegisterFenceResponse) -> ProducerState | None:
    """Returns the producer's state after the ranges of the answer, None if it has written nothing. Raises
    Unavailable."""
    states = [_states(held, answer.state).get(producer_id)]
    for older in answer.older:
        state = _states(held, older.producer_snapshot).get(producer_id)
        # Of its own range alone: the leader may have heard of batches of an older range that were given up since.
        states.append(None if state is None else within(state, older.start_offset, older.end_offset))
    return latest(state for state in states if state is not None)


def _states(held: HeldLog, snapshot: bytes) -> dict[int, ProducerState]:
    """Returns the producers' states in a snapshot. Raises Unavailable if it cannot be read: to go on without it would
    be to answer that nothing was written."""
    try:
        return decode_snapshot(snapshot)
    except SnapshotError as error:
        raise Unavailable(f"{held.log.describe()}: {error}; a newer agent wrote it, fence there") from error


def _waiting_reason(held: HeldLog, waits_for: types_pb2.OffsetRange) -> str:
    log = held.log
    of = f"{log.topic}/{log.key.partition}: epoch {waits_for.epoch} of agent {waits_for.agent_id}"
    if waits_for.HasField("end_offset"):
        return f"{of} is not in the object store yet, from offset {waits_for.registered_end} on"
    return f"{of} is not settled: what its log holds from offset {waits_for.registered_end} on is known to it alone"


def _not_settled(held: HeldLog, request: pb.FenceProducerRequest, why: _NotYet) -> pb.FenceProducerResponse:
    """Returns the answer that nothing is known yet to a request that does not wait. Raises Unavailable otherwise."""
    if request.max_wait_ms:
        raise Unavailable(
            f"{why.reason} (waited {request.max_wait_ms} ms)", limit="max_wait_ms", value=request.max_wait_ms
        )
    return pb.FenceProducerResponse(
        last_sequence=-1, last_offset=-1, settled=False, epoch=held.log.key.epoch, waiting_reason=why.reason
    )


def _answer(held: HeldLog, state: ProducerState | None) -> pb.FenceProducerResponse:
    if state is None:
        return pb.FenceProducerResponse(last_sequence=-1, last_offset=-1, settled=True, epoch=held.log.key.epoch)
    last = state.batches[-1]
    return pb.FenceProducerResponse(
        last_sequence=last.next_sequence - 1,
        last_record_count=last.record_count,
        last_offset=last.base_offset + last.record_count - 1,
        settled=True,
        epoch=held.log.key.epoch,
    )
