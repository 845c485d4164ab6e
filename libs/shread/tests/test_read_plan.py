"""The plan against a model that remembers every offset: nothing registered or unknown is passed over."""

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from shcluster.index import AgentSession, ClusterIndex, IndexMismatch, PartitionIndex
from shproto import events as ev
from shproto.keys import PartitionKey
from shproto.model import Range, RangeStatus, Segment
from shread.core.plan import (
    BelowStart,
    BeyondEnd,
    Lost,
    ReadSegment,
    ReadTail,
    SkipTo,
    Wait,
    next_readable,
    plan,
)
from shread.core.timestamps import AtEnd, LookInSegment, LookInTail, look

pytestmark = pytest.mark.quick

TOPIC_ID = "ab" * 16
KEY = PartitionKey(bytes.fromhex(TOPIC_ID), 0)
WIDTH = 12


def test_a_reader_waits_at_an_unrecovered_range_and_is_told_how_it_ends() -> None:
    cluster = ClusterIndex()
    cluster.apply(
        1,
        ev.TopicCreated(
            topic_id=TOPIC_ID,
            topic="orders",
            partitions=1,
            retention_ms=None,
            retention_bytes=None,
            min_acks=2,
            unclean_recovery_after_ms=None,
            created_ms=0,
        ),
    )
    cluster.sessions["s"] = AgentSession(session_id="s", agent_id="", role="ingest", address="127.0.0.1:1")
    unrecovered = Range(
        epoch=9,
        start_offset=0,
        limit_offset=100,
        registered_end=0,
        end_offset=None,
        status=RangeStatus.ORPHANED,
        agent_id="",
        wal_id="",
    )
    cluster.load_partition(KEY, 0, [unrecovered], [])
    step = plan(cluster, cluster.partitions[KEY], 0)
    assert isinstance(step, Wait) and "restore --complete" in step.reason


def test_a_restore_costs_a_snapshot() -> None:
    cluster = ClusterIndex()
    with pytest.raises(IndexMismatch, match="restored"):
        cluster.apply(1, ev.HistoryBegan(history_id="new", restored_from="old", backup="backup", backup_position=0))


@dataclass(kw_only=True)
class ModelRange:
    epoch: int
    agent: str
    start: int
    limit: int
    acked_end: int
    registered_end: int
    status: str = "open"
    end: int | None = None

    @property
    def registrable_end(self) -> int:
        return self.acked_end if self.end is None else min(self.acked_end, self.end)


@dataclass(kw_only=True)
class Model:
    log_start: int = 0
    ranges: list[ModelRange] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    live_agents: set[str] = field(default_factory=set)

    def stored(self) -> set[int]:
        """Offsets that a segment holds. Compaction joins segments over gaps, where no offset is."""
        held = {offset for segment in self.segments for offset in range(segment.base_offset, segment.end_offset)}
        written = {offset for item in self.ranges for offset in range(item.start, item.registered_end)}
        return {n for n in held & written if n >= self.log_start} - self.lost_spans()

    def lost_spans(self) -> set[int]:
        lost = (segment for segment in self.segments if segment.lost_reason)
        return {offset for segment in lost for offset in range(segment.base_offset, segment.end_offset)}

    def given_up(self) -> set[int]:
        """In ranges declared lost."""
        lost = (item for item in self.ranges if item.status == "lost")
        return {offset for item in lost for offset in range(item.registered_end, item.end or 0)}

    def pending(self) -> set[int]:
        """Acknowledged, not registered, and not given up: a reader has to wait for them or read the tail."""
        alive = (item for item in self.ranges if item.status != "lost")
        return {offset for item in alive for offset in range(item.registered_end, item.registrable_end)}

    def unknown(self) -> set[int]:
        """May still turn out to hold records: not settled yet."""
        open_ones = (item for item in self.ranges if item.end is None)
        return {offset for item in open_ones for offset in range(item.registered_end, item.limit)}


class PlanMachine(RuleBasedStateMachine):
    @initialize(durable=st.booleans())
    def create(self, durable: bool) -> None:
        self.model = Model()
        self.cluster = ClusterIndex()
        self.durable = durable
        self.made = 0
        self.apply(
            ev.TopicCreated(
                topic_id=TOPIC_ID,
                topic="t",
                partitions=1,
                retention_ms=None,
                retention_bytes=None,
                min_acks=3 if durable else 2,
                unclean_recovery_after_ms=None,
                created_ms=0,
            )
        )

    def apply(self, event: ev.Event) -> None:
        self.cluster.apply(self.cluster.position + 1, event)

    @property
    def partition(self) -> PartitionIndex:
        return self.cluster.partitions[KEY]

    @property
    def newest(self) -> ModelRange | None:
        return self.model.ranges[-1] if self.model.ranges else None

    @rule(agent=st.sampled_from("xyz"))
    def session(self, agent: str) -> None:
        if agent in self.model.live_agents:
            self.model.live_agents.discard(agent)
            self.apply(ev.SessionClosed(session_id=agent, agent_id=agent, role="ingest", why="expired"))
        else:
            self.model.live_agents.add(agent)
            self.apply(
                ev.SessionOpened(
                    session_id=agent,
                    agent_id=agent,
                    role="ingest",
                    address=f"{agent}:1",
                    wal_id=f"wal-{agent}",
                    started_ms=0,
                )
            )

    @rule(agent=st.sampled_from("xyz"))
    def grant(self, agent: str) -> None:
        before = self.newest
        if before is not None and before.status == "open":
            return
        start = 0 if before is None else before.limit if before.end is None else before.end
        if before is not None and before.status == "lost":
            start = before.limit
        epoch = 1 if before is None else before.epoch + 1
        self.model.ranges.append(
            ModelRange(
                epoch=epoch, agent=agent, start=start, limit=start + WIDTH, acked_end=start, registered_end=start
            )
        )
        self.apply(
            ev.EpochGranted(
                topic_id=TOPIC_ID,
                topic="t",
                partition=0,
                epoch=epoch,
                session_id="",
                agent_id=agent,
                wal_id=f"wal-{agent}",
                start_offset=start,
                limit_offset=start + WIDTH,
            )
        )

    @precondition(lambda self: self.newest is not None)
    @rule(count=st.integers(1, 5), which=st.integers(0, 5))
    def append(self, count: int, which: int) -> None:
        """Also by zombies: into an orphaned range of their own."""
        item = self.model.ranges[-1 - which % len(self.model.ranges)]
        if item.status in ("open", "orphaned"):
            item.acked_end = min(item.limit, item.acked_end + count)

    @precondition(lambda self: self.newest is not None)
    @rule(count=st.integers(1, 6), which=st.integers(0, 5), lost=st.booleans(), timestamp_ms=st.integers(-9, 9))
    def register(self, count: int, which: int, lost: bool, timestamp_ms: int) -> None:
        item = self.model.ranges[-1 - which % len(self.model.ranges)]
        end = min(item.registered_end + count, item.registrable_end)
        if item.status == "lost" or end <= item.registered_end:
            return
        segment = self.segment(item.epoch, item.registered_end, end, timestamp_ms, "gone" if lost else "")
        item.registered_end = end
        self.model.segments = sorted([*self.model.segments, segment], key=lambda one: one.base_offset)
        self.apply(ev.SegmentRegistered(segment, "b"))

    def segment(self, epoch: int, base: int, end: int, timestamp_ms: int, lost: str = "") -> Segment:
        self.made += 1
        key = "" if lost else f"k{self.made}"
        return Segment(
            segment_id=f"s{self.made}",
            topic_id=TOPIC_ID,
            topic="t",
            partition=0,
            epoch=epoch,
            base_offset=base,
            end_offset=end,
            record_count=end - base,
            object_key=key,
            object_at=0,
            size_bytes=100,
            raw_bytes=100,
            first_timestamp_ms=0,
            max_timestamp_ms=timestamp_ms,
            lost_reason=lost,
        )

    @precondition(lambda self: self.newest is not None and self.newest.status == "open")
    @rule()
    def orphan(self) -> None:
        assert self.newest is not None
        self.newest.status = "orphaned"
        self.apply(ev.RangeOrphaned(topic_id=TOPIC_ID, partition=0, epoch=self.newest.epoch))

    @precondition(lambda self: self.newest is not None)
    @rule(which=st.integers(0, 5), below=st.integers(0, 3))
    def settle(self, which: int, below: int) -> None:
        """At the end of the log, or below it (as for durable topics, or a log that lost its tail)."""
        item = self.model.ranges[-1 - which % len(self.model.ranges)]
        if item.status in ("open", "orphaned"):
            item.status, item.end = "settled", max(item.registered_end, item.acked_end - below)
            self.apply(ev.RangeSettled(topic_id=TOPIC_ID, partition=0, epoch=item.epoch, end_offset=item.end))

    @precondition(lambda self: self.newest is not None)
    @rule(which=st.integers(0, 5))
    def lose(self, which: int) -> None:
        item = self.model.ranges[-1 - which % len(self.model.ranges)]
        if item.status == "orphaned":
            item.status, item.end = "lost", item.limit
            self.apply(
                ev.RangeLost(topic_id=TOPIC_ID, partition=0, epoch=item.epoch, end_offset=item.limit, why="operator")
            )

    @precondition(lambda self: self.newest is not None and self.newest.status == "open")
    @rule()
    def extend(self) -> None:
        assert self.newest is not None
        self.newest.limit += WIDTH
        self.apply(
            ev.RangeExtended(topic_id=TOPIC_ID, partition=0, epoch=self.newest.epoch, limit_offset=self.newest.limit)
        )

    @precondition(lambda self: len(self.model.segments) > 1)
    @rule(first=st.integers(0, 20), count=st.integers(2, 4))
    def compact(self, first: int, count: int) -> None:
        """Adjacent ones, also over a gap between epochs where everything before the gap is registered."""
        first %= len(self.model.segments)
        chosen = self.model.segments[first : first + count]
        if len(chosen) < 2 or any(one.lost_reason for one in chosen):
            return
        inner = range(chosen[0].base_offset, chosen[-1].end_offset)
        if (self.model.pending() | self.model.unknown() | self.model.given_up()) & set(inner):
            return
        latest = max(one.max_timestamp_ms for one in chosen)
        merged = self.segment(chosen[-1].epoch, inner.start, inner.stop, latest)
        kept = [one for one in self.model.segments if one not in chosen]
        self.model.segments = sorted([*kept, merged], key=lambda one: one.base_offset)
        self.apply(ev.SegmentsCompacted(merged, tuple(one.segment_id for one in chosen)))

    @precondition(lambda self: len(self.model.segments) > 0)
    @rule(part=st.integers(0, 30))
    def retain(self, part: int) -> None:
        last = self.model.segments[-1]
        start = self.model.segments[0].base_offset
        offset = max(self.model.log_start, start + part % (last.end_offset - start + 1))
        if (self.model.pending() | self.model.unknown() | self.model.given_up()) & set(range(offset)):
            return
        gone = [one for one in self.model.segments if one.end_offset <= offset]
        self.model.segments = [one for one in self.model.segments if one.end_offset > offset]
        self.model.log_start = offset
        self.apply(
            ev.LogStartMoved(
                topic_id=TOPIC_ID,
                partition=0,
                log_start_offset=offset,
                removed_segment_ids=tuple(one.segment_id for one in gone),
                why="time",
            )
        )

    # ---- what must hold

    @invariant()
    def every_offset_has_the_right_step(self) -> None:
        model = self.model
        top = max([item.limit for item in model.ranges], default=0) + 3
        stored, pending, unknown = model.stored(), model.pending(), model.unknown()
        lost = model.lost_spans() | model.given_up()
        not_to_be_skipped = stored | pending | unknown
        for offset in range(max(0, model.log_start - 2), top):
            step = plan(self.cluster, self.partition, offset)
            if offset < model.log_start:
                assert step == BelowStart(model.log_start)
            elif offset in stored:
                assert isinstance(step, ReadSegment)
                assert step.segment.base_offset <= offset < step.segment.end_offset
            elif offset in lost:
                assert isinstance(step, Lost) and step.base_offset <= offset < step.end_offset <= step.next_offset
                assert not not_to_be_skipped & set(range(offset, step.next_offset))
            elif offset in pending:
                self.check_pending(step, offset)
            else:
                self.check_nothing_there(step, offset, not_to_be_skipped | lost)

    def check_pending(self, step: object, offset: int) -> None:
        item = next(one for one in self.model.ranges if one.registered_end <= offset < one.registrable_end)
        if self.durable:
            beyond = BeyondEnd(item.registered_end)
            assert isinstance(step, Wait) or (step == beyond and item is self.newest and offset > item.registered_end)
        elif item.agent in self.model.live_agents:
            assert isinstance(step, ReadTail)
            assert (step.epoch, step.address, step.end_offset) == (item.epoch, f"{item.agent}:1", item.end)
        else:
            assert isinstance(step, Wait) and item.agent in step.reason and str(item.registered_end) in step.reason

    def check_nothing_there(self, step: object, offset: int, readable: set[int]) -> None:
        match step:
            case SkipTo(target):
                assert target > offset and not readable & set(range(offset, target))
            case ReadSegment(segment):  # compacted over a gap
                assert segment.base_offset < offset < segment.end_offset
            case BeyondEnd():
                assert not {n for n in readable - self.model.unknown() if n > offset} or self.durable
            case ReadTail() | Wait():
                newest = self.newest
                is_end = newest is None or offset in (newest.end, self.model.log_start) or self.may_be_extended(offset)
                assert is_end or offset in self.model.unknown() | self.settled_unregistered()
            case _:
                raise AssertionError(f"{step} at {offset}")

    def may_be_extended(self, offset: int) -> bool:
        """The leader may have been given more offsets, and written them, before the feed tells of it."""
        newest = self.newest
        assert newest is not None
        return newest.end is None and (offset == newest.limit or (newest.status == "open" and offset > newest.limit))

    def settled_unregistered(self) -> set[int]:
        """A log that came back may end below the declared end; then readers wait (for ReportLost)."""
        settled = (one for one in self.model.ranges if one.status == "settled")
        return {offset for one in settled for offset in range(one.registered_end, one.end or 0)}

    @invariant()
    def a_reader_from_the_start_sees_every_registered_record_once_in_order(self) -> None:
        offset, seen = self.model.log_start, []
        for _ in range(1_000):
            step = plan(self.cluster, self.partition, offset)
            match step:
                case ReadSegment(segment):
                    seen += [n for n in range(offset, segment.end_offset) if n in self.model.stored()]
                    offset = segment.end_offset
                case SkipTo(target):
                    offset = target
                case Lost():
                    offset = step.next_offset
                case _:
                    break
        assert seen == sorted(n for n in self.model.stored() if n < offset)
        after = {n for n in self.model.stored() if n >= offset}
        assert not after or (self.model.unknown() | self.settled_unregistered()) & set(range(offset, min(after)))

    @invariant()
    def next_readable_skips_nothing(self) -> None:
        readable = self.model.stored() | self.model.pending() | self.model.unknown()
        for offset in range(self.model.log_start, self.model.log_start + 3 * WIDTH):
            target = next_readable(self.partition, offset)
            assert target >= offset and not readable & set(range(offset, target))

    @invariant()
    def a_search_by_timestamp_looks_everywhere_in_order(self) -> None:
        for timestamp_ms in (-10, 0, 5, 10):
            candidates = [
                one.base_offset
                for one in self.model.segments
                if one.max_timestamp_ms >= timestamp_ms
                and not one.lost_reason
                and one.end_offset > self.model.log_start
            ]
            tails = sorted((self.model.unknown() | self.settled_unregistered()) - set(range(self.model.log_start)))
            found = look(self.partition, timestamp_ms, 0)
            match found:
                case LookInSegment(segment):
                    assert segment.base_offset == candidates[0] and (not tails or tails[0] > segment.base_offset)
                case LookInTail(offset):
                    assert offset == tails[0] and (not candidates or offset < candidates[0])
                case AtEnd():
                    assert not candidates and not tails


PlanMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPlan = PlanMachine.TestCase


def test_readers_are_told_that_a_log_came_back_without_its_end() -> None:
    machine = PlanMachine()
    machine.create(durable=False)
    machine.grant("x")
    machine.append(5, 0)
    machine.orphan()
    machine.apply(ev.LogFoundTruncated(topic_id=TOPIC_ID, partition=0, epoch=1, log_end=3, acknowledged_end=5))
    step = plan(machine.cluster, machine.partition, 0)
    assert isinstance(step, Wait | ReadTail)
    assert "came back without records up to offset 5 that it had acknowledged" in step.reason


def test_two_sessions_of_one_agent_and_a_session_of_unknown_log() -> None:
    cluster = ClusterIndex()
    cluster.apply(
        1, ev.SessionOpened(session_id="s1", agent_id="a", role="ingest", address="old:1", wal_id="w", started_ms=0)
    )
    cluster.apply(
        2, ev.SessionOpened(session_id="s2", agent_id="a", role="ingest", address="new:1", wal_id="w", started_ms=0)
    )
    assert cluster.address_of("a", "w") == "new:1"
    assert cluster.address_of("a", "another log") == ""
    cluster.apply(
        3, ev.SessionOpened(session_id="s3", agent_id="a", role="query", address="q:1", wal_id="", started_ms=0)
    )
    assert cluster.address_of("a", "w") == "new:1"
    cluster.apply(4, ev.SessionClosed(session_id="s2", agent_id="a", role="ingest", why="expired"))
    assert cluster.address_of("a", "w") == "old:1"
    cluster.sessions["s1"] = replace(cluster.sessions["s1"], wal_id="")  # as a snapshot has it
    assert cluster.address_of("a", "w") == "old:1"


def test_a_search_by_timestamp_sees_a_segment_that_was_registered_late() -> None:
    """After a takeover the older range is registered when the newer one already has segments."""
    machine = PlanMachine()
    machine.create(durable=False)
    machine.grant("x")
    machine.append(5, 0)
    machine.orphan()
    machine.grant("y")
    for timestamp_ms in (1, 2):
        machine.append(2, 0)
        machine.register(2, 0, False, timestamp_ms)
    machine.a_search_by_timestamp_looks_everywhere_in_order()
    machine.settle(1, 0)
    machine.register(5, 1, False, 7)
    assert [one.max_timestamp_ms for one in machine.partition.segments] == [7, 1, 2]
    for timestamp_ms in (0, 2, 3, 7):
        assert look(machine.partition, timestamp_ms, 0) == LookInSegment(machine.partition.segments[0])
    machine.a_search_by_timestamp_looks_everywhere_in_order()
