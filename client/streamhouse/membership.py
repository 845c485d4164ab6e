"""Membership of a consumer in its group: joins, sends heartbeats, reports owned partitions, leaves.

Owns: member id, generation, the topics to join with. Does not own: the partitions that are read or revoked, positions.
Invariants: one call to the group at a time, so that no answer overtakes another. An answer to a former member id
changes nothing. Heartbeats continue regardless of the application and its partitions. After `step_out` nothing joins
again before `come_back`.
"""

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet

from shproto.errors import IllegalGeneration, StreamHouseError, UnknownGroup, UnknownMember
from shproto.limits import RETRY_FIRST_MS, RETRY_MS_MAX
from shproto.services import CoordinatorApi
from shproto.v1 import coordinator_pb2
from shruntime.tasks import Backoff, cancel_and_wait

from streamhouse.core.options import ConsumerOptions
from streamhouse.core.positions import Position
from streamhouse.offsets import commits_of
from streamhouse.records import TopicPartition

log = logging.getLogger(__name__)


# Wait of a heartbeat while another member still holds partitions assigned to this member. The coordinator answers early
# when they are released.
PENDING_WAIT_MS = 1_000


class Membership:
    """Keeps a consumer in its group. `given(partitions)`: called with the assigned partitions of each answer. `lost()`:
    called when all partitions may belong to other members, so that commits are refused. `owned()`: returns the
    partitions read or not released yet; the group assigns them to no other member. `failed(error)`: called with errors
    for the application."""

    def __init__(
        self,
        coordinator: CoordinatorApi,
        options: ConsumerOptions,
        topics: Iterable[str],
        *,
        given: Callable[[set[TopicPartition]], None],
        lost: Callable[[], None],
        owned: Callable[[], AbstractSet[TopicPartition]],
        failed: Callable[[StreamHouseError], None],
    ) -> None:
        self._coordinator = coordinator
        self._options = options
        self._topics = tuple(sorted(topics))
        self._joined_topics: tuple[str, ...] | None = None  # topics of the last join that was answered
        self._given = given
        self._lost = lost
        self._owned = owned
        self._failed = failed
        self._heartbeat_interval_ms = 0
        self._backoff = Backoff(RETRY_FIRST_MS, RETRY_MS_MAX)
        self._moved = asyncio.Event()
        self._in_group = asyncio.Event()  # or joining
        self._in_group.set()
        self._report_due = asyncio.Event()  # something is to be reported to the group
        self._answered = asyncio.Event()  # or failed
        self._failure: StreamHouseError | None = None
        self._failing_since_s: float | None = None
        self._joining_id = ""
        self._joining = asyncio.Lock()
        self._leaving = False
        self._assigned: set[TopicPartition] = set()  # in the last answer
        self.member_id = ""
        self.generation = 0
        self.pending = False
        # For each owned partition the number of the answer that assigned it. Between two answers another member may
        # have owned the partition.
        self._tenures: dict[TopicPartition, int] = {}
        self._answers = 0
        self.rebalance_count = 0  # answers that gave or took partitions

    async def join(self) -> None:
        """Joins the group, or joins again with other topics. Raises UnknownTopic, InvalidArgument, Unavailable."""
        # The client chooses the member id: a join can then be repeated after a lost answer without leaving a ghost
        # member behind.
        self._joining_id = self.member_id or self._joining_id or f"{self._options.client_id or 'member'}-{uuid.uuid4()}"
        topics = self._topics
        request = coordinator_pb2.JoinGroupRequest(
            group=self._options.group or "",
            member_id=self._joining_id,
            topics=topics,
            client_id=self._options.client_id,
            session_timeout_ms=self._options.session_timeout_ms,
            owned=_messages(self._owned()),
        )
        async with self._joining:
            answer = await self._coordinator.join_group(request)
            if self.is_out:  # left while joining: the group would wait for this member until it expires
                await self._leave_as(answer.member_id)
                return
        self._joined_topics = topics
        self._apply(answer)

    def read_topics(self, topics: Iterable[str]) -> None:
        """Joins with these topics, as soon as the call under way is answered."""
        self._topics = tuple(sorted(topics))
        self._report_due.set()

    async def joined(self) -> None:
        """Returns once the group knows the current topics, or this is no member any more. Raises the error of joining
        if the error is not retriable."""
        while not self.is_out and (not self.member_id or self._joined_topics != self._topics):
            self._answered.clear()
            await self._answered.wait()
            if self._failure is not None and not self._failure.retriable:
                raise self._failure

    async def run(self) -> None:
        """Sends heartbeats until cancelled or leaving; joins again when the group has forgotten this member, or the
        topics have changed."""
        while not self._leaving:
            await self._in_group.wait()
            if self._leaving:
                return
            asked_as = self.member_id
            try:
                if not asked_as or self._joined_topics != self._topics:
                    await self.join()
                else:
                    answer = await self._beat()
                    if answer is not None and asked_as == self.member_id:
                        self._apply(answer)
                        if self._assigned - self._owned():  # unwanted: the group would assign them again at once
                            await self._pause()
                    self._backoff.reset()  # not after a join: a member that the group forgets each time must not spin
                self._note_success()
            except (UnknownMember, UnknownGroup) as error:
                if self._leaving:  # the answer to an earlier heartbeat; joining again would leave a ghost member behind
                    return
                if asked_as != self.member_id:
                    continue  # concerns a membership that has already ended
                log.warning("group %s has forgotten member %s: %s", self._options.group, self.member_id, error)
                self._forgotten()
                await asyncio.sleep(self._backoff.next_ms() / 1000)
            except StreamHouseError as error:
                self._note_failure(error)
                if not error.retriable:
                    self._failed(error)
                await asyncio.sleep(self._backoff.next_ms() / 1000)

    async def _beat(self) -> coordinator_pb2.GroupAssignment | None:
        """Sends a heartbeat and returns the answer; None if something is to be reported before the answer comes."""
        self._report_due.clear()
        beat = asyncio.ensure_future(self._coordinator.heartbeat_group(self._heartbeat()))
        report_due = asyncio.ensure_future(self._report_due.wait())
        try:
            await asyncio.wait((beat, report_due), return_when=asyncio.FIRST_COMPLETED)
            # The group repeats an answer dropped here: its partitions are not reported as owned.
            return beat.result() if beat.done() else None
        finally:
            await cancel_and_wait(beat, report_due)

    async def _pause(self) -> None:
        """Returns when the next heartbeat is due, or earlier if something is to be reported."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._heartbeat_interval_ms / 1000):
                await self._report_due.wait()

    def _note_failure(self, error: StreamHouseError) -> None:
        """Logs a warning when an outage begins; the failures that follow are debug lines."""
        self._failure = error
        self._answered.set()
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
        return coordinator_pb2.HeartbeatGroupRequest(
            group=self._options.group or "",
            member_id=self.member_id,
            generation=self.generation,
            owned=_messages(self._owned()),
            # The coordinator holds the answer back for so long: a rebalance reaches the member at once, without
            # frequent heartbeats.
            max_wait_ms=PENDING_WAIT_MS if self.pending else self._heartbeat_interval_ms,
        )

    def _apply(self, answer: coordinator_pb2.GroupAssignment) -> None:
        self.member_id = answer.member_id
        self._heartbeat_interval_ms = answer.heartbeat_interval_ms
        self.pending = answer.pending
        assigned = {TopicPartition(item.topic, item.partition) for item in answer.assigned}
        self._answers += 1
        self._given(assigned)
        self.owned_changed()
        self._renew(answer.generation)
        if assigned != self._assigned:
            self._assigned = assigned
            self.rebalance_count += 1
            log.info("group %s generation %d: %d partitions", self._options.group, self.generation, len(assigned))
        self._failure = None
        self._answered.set()

    def owned_changed(self) -> None:
        """Notes which partitions are owned now, and reports released partitions to the group at once: their next owners
        wait for that."""
        owned = self._owned()
        released = self._tenures.keys() - owned
        for where in released:
            del self._tenures[where]
        self._tenures.update(dict.fromkeys(owned - self._tenures.keys(), self._answers))
        if released:
            self._report_due.set()

    def _renew(self, generation: int) -> None:
        # A commit that was refused with the earlier generation waits for this: see commit_through_rebalance.
        if generation != self.generation:
            self.generation = generation
            moved, self._moved = self._moved, asyncio.Event()
            moved.set()

    def _forgotten(self) -> None:
        self.member_id, self._joining_id, self.pending = "", "", False
        self._assigned = set()
        self._tenures = {}
        self._lost()

    async def commit(self, positions: Mapping[TopicPartition, Position]) -> None:
        """Stores the positions in the group.

        Raises IllegalGeneration if this member does not know the group's generation yet or a partition was revoked;
        UnknownMember if the group has forgotten this member, which owns nothing from then on; UnknownTopic if a topic
        was deleted, perhaps created again.
        """
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
                self._forgotten()  # now, not at the next heartbeat: others process the received records
            raise

    async def commit_through_rebalance(self, positions: Mapping[TopicPartition, Position]) -> None:
        """Commits like `commit`. If the group's generation has moved on, waits for the next heartbeat and tries once
        more, provided that this member has owned all partitions without a break: during a break another member may have
        read further."""
        generation, moved = self.generation, self._moved
        tenures = self._tenures_of(positions)
        try:
            await self.commit(positions)
        except IllegalGeneration:
            if self.generation == generation and not await self._has_moved_on(moved):
                raise
            if self._tenures_of(positions) != tenures:
                raise
            await self.commit(positions)

    def _tenures_of(self, partitions: Iterable[TopicPartition]) -> list[int]:
        """Returns for each partition the number of the answer since which this member owns it. Raises IllegalGeneration
        if a partition is not owned."""
        foreign = sorted(set(partitions) - self._tenures.keys())
        if foreign:
            raise IllegalGeneration(
                f"group {self._options.group}: not assigned to this consumer (any more): "
                f"{', '.join(f'{topic}/{partition}' for topic, partition in foreign)}",
                generation=self.generation,
            )
        return [self._tenures[where] for where in partitions]

    async def _has_moved_on(self, moved: asyncio.Event) -> bool:
        """Returns True if a heartbeat brings another generation within request_timeout_ms."""
        try:
            async with asyncio.timeout(self._options.request_timeout_ms / 1000):
                await moved.wait()
        except TimeoutError:
            return False
        return True

    async def leave(self) -> None:
        """Leaves the group for good. Raises Unavailable; the group then notices by the session timeout."""
        self._leaving = True
        self._in_group.set()
        self._report_due.set()
        self._answered.set()
        async with self._joining:  # a join under way leaves by itself
            member_id, self.member_id = self.member_id, ""
        if member_id:
            await self._leave_as(member_id)

    async def step_out(self) -> None:
        """Leaves the group until `come_back`: its partitions are lost and go to other members. Raises Unavailable as
        `leave` does; the member is out all the same."""
        member_id = self.member_id
        self._in_group.clear()
        self._report_due.set()
        self._answered.set()
        # Before the call: the partitions are lost also if the group cannot be reached.
        self._forgotten()
        if member_id:
            await self._leave_as(member_id)

    @property
    def is_out(self) -> bool:
        """True after `leave`, and from `step_out` to `come_back`: the member does not try to join."""
        return self._leaving or not self._in_group.is_set()

    def come_back(self) -> None:
        """Allows the member to join again after `step_out`."""
        self._in_group.set()

    async def _leave_as(self, member_id: str) -> None:
        request = coordinator_pb2.LeaveGroupRequest(group=self._options.group or "", member_id=member_id)
        await self._coordinator.leave_group(request)


def _messages(partitions: Iterable[TopicPartition]) -> list[coordinator_pb2.TopicPartition]:
    return [coordinator_pb2.TopicPartition(topic=topic, partition=partition) for topic, partition in sorted(partitions)]
