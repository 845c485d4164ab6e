"""A consumer's membership of its group: join, heartbeat, give up what is taken away, leave.

Owns: member id, generation, which partitions are ours. Does not own: reading, positions.
Invariants: an answer to a heartbeat of a member that this is no longer changes nothing. After `step_out` nothing joins
again before `come_back`.
"""

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

from shproto.errors import IllegalGeneration, StreamHouseError, UnknownGroup, UnknownMember
from shproto.services import CoordinatorApi
from shproto.v1 import coordinator_pb2
from shruntime.tasks import Backoff

from streamhouse.core.options import ConsumerOptions
from streamhouse.core.positions import Position
from streamhouse.offsets import commits_of
from streamhouse.records import TopicPartition
from streamhouse.retries import RETRY_FIRST_MS, RETRY_MS_MAX

log = logging.getLogger(__name__)


# While partitions that were promised are still held by another member. The answer comes early when they are let go.
PENDING_WAIT_MS = 1_000


class Membership:
    """`assigned(partitions)`: start on these. `revoked(partitions)`: stop, commit; awaited before they are let go.
    `lost()`: all of them are somebody else's now, commits are refused. `failed(error)`: for the application."""

    def __init__(
        self,
        coordinator: CoordinatorApi,
        options: ConsumerOptions,
        topics: Sequence[str],
        *,
        assigned: Callable[[set[TopicPartition]], None],
        revoked: Callable[[set[TopicPartition]], Awaitable[None]],
        lost: Callable[[], None],
        failed: Callable[[StreamHouseError], None],
    ) -> None:
        self._coordinator = coordinator
        self._options = options
        self._topics = topics
        self._assigned = assigned
        self._revoked = revoked
        self._lost = lost
        self._failed = failed
        self._heartbeat_interval_ms = 0
        self._backoff = Backoff(RETRY_FIRST_MS, RETRY_MS_MAX)
        self._moved = asyncio.Event()
        self._in_group = asyncio.Event()  # or on the way to it
        self._in_group.set()
        self._failing_since_s: float | None = None
        self._joining_id = ""
        self._asap = False
        self._leaving = False
        self.member_id = ""
        self.generation = 0
        self.pending = False
        self.owned: set[TopicPartition] = set()
        # Of those owned and not about to be given up: by which assignment. Somebody else may have been between two.
        self._tenures: dict[TopicPartition, int] = {}
        self._assignments = 0
        self.rebalance_count = 0  # assignments that gave or took partitions

    async def join(self) -> None:
        """Becomes a member. Raises UnknownTopic, InvalidArgument, Unavailable."""
        # An id of our own, so that a join whose answer was lost can be repeated without leaving a ghost behind.
        self._joining_id = self._joining_id or f"{self._options.client_id or 'member'}-{uuid.uuid4()}"
        request = coordinator_pb2.JoinGroupRequest(
            group=self._options.group or "",
            member_id=self._joining_id,
            topics=self._topics,
            client_id=self._options.client_id,
            session_timeout_ms=self._options.session_timeout_ms,
        )
        await self._apply(await self._coordinator.join_group(request))

    async def run(self) -> None:
        """Heartbeats until cancelled or leaving; joins again when the group has forgotten this member."""
        while not self._leaving:
            await self._in_group.wait()
            if self._leaving:
                return
            asked_as = self.member_id
            try:
                if asked_as:
                    answer = await self._coordinator.heartbeat_group(self._heartbeat())
                    if asked_as == self.member_id:
                        await self._apply(answer)
                    self._backoff.reset()  # not after a join: a member that is forgotten each time must not spin
                else:
                    await self.join()
                self._note_success()
            except (UnknownMember, UnknownGroup) as error:
                if self._leaving:  # a heartbeat on its way was told so; joining again would leave a ghost behind
                    return
                if asked_as != self.member_id:
                    continue  # of a membership that is over, and known to be
                log.warning("group %s has forgotten member %s: %s", self._options.group, self.member_id, error)
                self._forgotten()
                await asyncio.sleep(self._backoff.next_ms() / 1000)
            except StreamHouseError as error:
                self._note_failure(error)
                if not error.retriable:
                    self._failed(error)
                await asyncio.sleep(self._backoff.next_ms() / 1000)

    def _note_failure(self, error: StreamHouseError) -> None:
        """Warns of an outage once, when it begins; the failures that follow are debug lines."""
        if self._failing_since_s is None:
            self._failing_since_s = asyncio.get_running_loop().time()
            log.warning("heartbeats to group %s fail, trying again: %s", self._options.group, error)
        else:
            log.debug("heartbeat to group %s failed: %s", self._options.group, error)

    def _note_success(self) -> None:
        if self._failing_since_s is not None:
            took_s = asyncio.get_running_loop().time() - self._failing_since_s
            log.warning("heartbeats to group %s are answered again, after %.1f s", self._options.group, took_s)
            self._failing_since_s = None

    def _heartbeat(self) -> coordinator_pb2.HeartbeatGroupRequest:
        wait_ms = PENDING_WAIT_MS if self.pending else self._heartbeat_interval_ms
        return coordinator_pb2.HeartbeatGroupRequest(
            group=self._options.group or "",
            member_id=self.member_id,
            generation=self.generation,
            owned=_messages(self.owned),
            max_wait_ms=0 if self._asap else wait_ms,
        )

    async def _apply(self, answer: coordinator_pb2.GroupAssignment) -> None:
        self.member_id = answer.member_id
        self._heartbeat_interval_ms = answer.heartbeat_interval_ms
        given = {TopicPartition(item.topic, item.partition) for item in answer.assigned}
        revoked, added = self.owned - given, given - self.owned
        self._tenures = {where: since for where, since in self._tenures.items() if where not in revoked}
        self._renew(answer.generation)
        # Whatever was given up is told at once, so that its next owner need not wait.
        self._asap = bool(revoked)
        if revoked:
            self.pending = answer.pending or bool(added)  # also while what is revoked is being given up
            await self._revoked(revoked)
            if self.member_id != answer.member_id:
                return  # the commit of what was revoked was told that the group has forgotten us
            self.owned -= revoked
        self.owned |= added
        self._assignments += 1
        self._tenures.update(dict.fromkeys(added, self._assignments))
        self.pending = answer.pending
        if added or revoked:
            self.rebalance_count += 1
            log.info("group %s generation %d: %d partitions", self._options.group, self.generation, len(self.owned))
        self._assigned(added)

    def _renew(self, generation: int) -> None:
        if generation != self.generation:
            self.generation = generation
            moved, self._moved = self._moved, asyncio.Event()
            moved.set()

    def _forgotten(self) -> None:
        self.member_id, self._joining_id, self.owned, self.pending = "", "", set(), False
        self._tenures = {}
        self._lost()

    async def commit(self, positions: Mapping[TopicPartition, Position]) -> None:
        """Raises IllegalGeneration when a rebalance is not known here yet or took a partition away; UnknownMember when
        the group has forgotten this member: nothing is its own any more from then on; UnknownTopic when a topic was
        deleted, and perhaps created again."""
        request = coordinator_pb2.CommitOffsetsRequest(
            group=self._options.group or "",
            member_id=self.member_id,
            generation=self.generation,
            offsets=commits_of(positions),
        )
        try:
            await self._coordinator.commit_offsets(request)
        except UnknownMember:
            if self.member_id == request.member_id:
                self._forgotten()  # before the next heartbeat tells: what was received is somebody else's to process
            raise

    async def commit_through_rebalance(self, positions: Mapping[TopicPartition, Position]) -> None:
        """Like `commit`; if the group has moved on, waits to hear of it and tries once more, if all of it has been ours
        without a break: in one somebody else may have gone further."""
        generation, moved = self.generation, self._moved
        tenures = self._tenures_of(positions)
        try:
            await self.commit(positions)
        except IllegalGeneration:
            if self.generation == generation and not await self._hears_of(moved):
                raise
            if self._tenures_of(positions) != tenures:
                raise
            await self.commit(positions)

    def _tenures_of(self, partitions: Iterable[TopicPartition]) -> list[int]:
        """Since which assignments these are ours. Raises IllegalGeneration where they are not."""
        foreign = sorted(set(partitions) - self._tenures.keys())
        if foreign:
            raise IllegalGeneration(
                f"group {self._options.group}: not assigned to this consumer (any more): "
                f"{', '.join(f'{topic}/{partition}' for topic, partition in foreign)}",
                generation=self.generation,
            )
        return [self._tenures[where] for where in partitions]

    async def _hears_of(self, moved: asyncio.Event) -> bool:
        """Whether a heartbeat tells of another generation within the request timeout."""
        try:
            async with asyncio.timeout(self._options.request_timeout_ms / 1000):
                await moved.wait()
        except TimeoutError:
            return False
        return True

    async def leave(self) -> None:
        """Raises Unavailable; the group finds out by the session timeout then."""
        self._leaving = True
        self._in_group.set()
        if self.member_id:
            await self._leave_as(self.member_id)
            self.member_id, self.owned = "", set()

    async def step_out(self) -> None:
        """Leaves the group until `come_back`: its partitions are lost, and go to other members. Raises Unavailable as
        `leave` does; it is out all the same."""
        member_id = self.member_id
        self._in_group.clear()
        self._forgotten()
        if member_id:
            await self._leave_as(member_id)

    @property
    def is_out(self) -> bool:
        """True if it has left, or stepped out, and does not try to join."""
        return self._leaving or not self._in_group.is_set()

    def come_back(self) -> None:
        """Lets it join again, if it has stepped out."""
        self._in_group.set()

    async def _leave_as(self, member_id: str) -> None:
        request = coordinator_pb2.LeaveGroupRequest(group=self._options.group or "", member_id=member_id)
        await self._coordinator.leave_group(request)


def _messages(partitions: Iterable[TopicPartition]) -> list[coordinator_pb2.TopicPartition]:
    return [coordinator_pb2.TopicPartition(topic=topic, partition=partition) for topic, partition in sorted(partitions)]
