"""Row operations: fewer statements with the same effect, and a whole control plane in memory under random commands."""

import asyncio
import random
from dataclasses import fields
from typing import Any

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shproto import events as ev
from shproto.errors import StreamHouseError
from shproto.model import Segment
from shproto.v1 import coordinator_pb2 as pb
from shproto.v1 import types_pb2
from shruntime.clock import ManualClock
from streamhouse_coordinator.adapters import memory, sql
from streamhouse_coordinator.api import CoordinatorApi
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.projection import Put, Remove, RowOp, Set, coalesce, row_ops
from streamhouse_coordinator.feed import Feed
from streamhouse_coordinator.service.common import Context
from streamhouse_coordinator.settings import CoordinatorSettings
from streamhouse_coordinator.sweeper import Sweeper

names = st.sampled_from(["a", "b"])
numbers = st.integers(0, 2)
keys = st.tuples(names, numbers)
ops = st.lists(
    st.one_of(
        st.builds(
            lambda k, e: Put(t.PARTITIONS, t.PartitionRow(topic_id=k[0], partition=k[1], epoch=e, log_start_offset=0)),
            keys,
            numbers,
        ),
        st.builds(lambda k, e: Set(t.PARTITIONS, k, {"epoch": e}), keys, numbers),
        st.builds(lambda k, o: Set(t.PARTITIONS, k, {"log_start_offset": o}), keys, numbers),
        st.builds(lambda k: Remove(t.PARTITIONS, {"topic_id": k[0], "partition": k[1]}), keys),
        st.builds(lambda name: Remove(t.PARTITIONS, {"topic_id": name}), names),
        st.builds(
            lambda k, e: Put(t.SESSION_LEASES, t.SessionLeaseRow(session_id=k[0], expires_ms=k[1], grants_version=e)),
            keys,
            numbers,
        ),
    ),
    max_size=12,
)


def effect(operations: list[RowOp]) -> dict[str, Any]:
    tables: dict[str, Any] = {}
    for op in operations:
        memory.change(tables, op)
    return {name: rows for name, rows in tables.items() if rows}


@given(ops)
def test_coalescing_keeps_the_effect(operations: list[RowOp]) -> None:
    groups = coalesce(operations)
    assert effect([op for group in groups for op in group]) == effect(operations)
    for group in groups:
        assert len({(op.table.name, type(op)) for op in group}) == 1
        assert effect(list(reversed(group))) is not None
        if isinstance(group[0], Set):
            assert len({tuple(sorted(op.changes)) for op in group if isinstance(op, Set)}) == 1


async def test_sql_does_what_the_operations_mean(coordinator: Any, dsn: str) -> None:
    rng = random.Random(20)
    connection = await asyncpg.connect(dsn)
    for _ in range(60):
        await connection.execute("TRUNCATE partitions, session_leases")
        operations = [_random_op(rng) for _ in range(rng.randrange(12))]
        for group in coalesce(operations):
            text, arguments = sql.change(group)
            await connection.execute(text, *arguments)
        stored = {}
        for table in (t.PARTITIONS, t.SESSION_LEASES):
            rows = [table.row_of(record) for record in await connection.fetch(f"SELECT * FROM {table.name}")]
            stored |= {table.name: {table.key_of(row): row for row in rows}} if rows else {}  # type: ignore[arg-type]
        assert stored == effect(operations)
    await connection.close()


def _random_op(rng: random.Random) -> RowOp:
    key = (rng.choice("ab"), rng.randrange(3))
    return rng.choice(
        [
            Put(
                t.PARTITIONS,
                t.PartitionRow(topic_id=key[0], partition=key[1], epoch=rng.randrange(9), log_start_offset=0),
            ),
            Set(t.PARTITIONS, key, {"epoch": rng.randrange(9)}),
            Set(t.PARTITIONS, key, {"log_start_offset": rng.randrange(9)}),
            Remove(t.PARTITIONS, {"topic_id": key[0], "partition": key[1]}),
            Remove(t.PARTITIONS, {"topic_id": key[0]}),
            Put(
                t.SESSION_LEASES,
                t.SessionLeaseRow(session_id=key[0], expires_ms=key[1], grants_version=rng.randrange(9)),
            ),
        ]
    )


async def test_tables_are_as_their_rows_say(coordinator: Any, dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    for table in (*t.PROJECTIONS, *t.STATE, t.EVENTS):
        found = await connection.fetch(
            "SELECT column_name, data_type FROM information_schema.columns WHERE table_name = $1 "
            "AND table_schema = 'public' ORDER BY ordinal_position",
            table.name,
        )
        assert {row["column_name"]: row["data_type"] for row in found} == sql.column_types(table), table.name
        assert [row["column_name"] for row in found] == list(table.columns)
    await connection.close()


def test_every_event_has_a_projection() -> None:
    unhandled = row_ops.registry[object]
    missing = [name for name, kind in ev.Event.registry.items() if row_ops.dispatch(kind) is unhandled]
    assert missing == []


def test_segments_of_events_fit_their_table() -> None:
    assert {item.name for item in fields(Segment)} - set(t.SEGMENTS.columns) == {"topic"}


# ---- a control plane in memory


class Nobody:
    """No process is behind any session."""

    def follower_gone(self, session_id: str) -> None:
        """Nothing is to be found out."""

    async def holds(self, session: t.SessionRow) -> bool:
        return False


class Walk:
    """Random commands of agents, segmenters and members; nothing of what they hit is an error."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.clock = ManualClock(1_000_000)
        self.store = memory.MemoryMetadataStore(self.clock)
        settings = CoordinatorSettings.load(
            {},
            range_width_offsets=64,
            session_ttl_ms=1000,
            pg_timeout_ms=100,
            pg_transaction_idle_ms=100,
            heartbeat_interval_ms=100,
            session_sweep_interval_ms=200,
        )
        # More than an operator may set: so that leases end over outages that are not made up for.
        settings = settings.model_copy(update={"session_sweep_interval_ms": 1000})
        self.context = Context(store=self.store, settings=settings, new_id=self.new_id)
        feed = Feed(self.store, poll_interval_ms=1000, batch=100, cached=100)
        self.api = CoordinatorApi(self.context, feed, Nobody())
        self.sessions: dict[str, str] = {}
        self.claims: list[pb.ClaimBufferResponse] = []
        self.objects: list[str] = []
        self.gone: set[str] = set()
        self.members: dict[str, pb.GroupAssignment] = {}

    def new_id(self) -> str:
        return f"00000000-0000-4000-8000-{self.rng.getrandbits(48):012x}"

    async def step(self) -> None:
        choices = [self.topic, self.delete, self.open, self.open, self.seal, self.seal, self.claim, self.register]
        choices += [self.register, self.settle, self.close, self.expire, self.join, self.speak, self.retain, self.beat]
        choices += [self.declare, self.declare, self.sweep, self.sweep]
        try:
            await self.rng.choice(choices)()
        except StreamHouseError as error:
            assert error.reason != "INTERNAL", error

    async def topic(self) -> None:
        acks = self.rng.choice([2, 3])
        request = pb.CreateTopicRequest(topic=self.rng.choice("tu"), partitions=self.rng.randint(1, 4), min_acks=acks)
        if self.rng.random() < 0.5:
            request.retention_bytes = 250
        await self.api.create_topic(request)

    async def delete(self) -> None:
        if self.rng.random() < 0.2:
            await self.api.delete_topic(pb.DeleteTopicRequest(topic=self.rng.choice("tu")))

    async def open(self) -> None:
        name = self.rng.choice("abc")
        own = [row for row in self.rows(t.RANGES) if row.wal_id == self.wal(name).hex() and row.end_offset is None]
        ends = [
            pb.WalEnd(
                topic_id=bytes.fromhex(row.topic_id),
                partition=row.partition,
                epoch=row.epoch,
                end_offset=min(row.registered_end + self.rng.choice([0, 10]), row.limit_offset),
            )
            for row in own
        ]
        request = pb.OpenSessionRequest(agent_id=name, role="ingest", wal_id=self.wal(name), wal_ends=ends)
        self.sessions[name] = (await self.api.open_session(request)).session_token

    def wal(self, name: str) -> bytes:
        return name.encode() * 16

    def session(self) -> str:
        return self.sessions.get(self.rng.choice("abc"), "none")

    async def seal(self) -> None:
        token = self.session()
        grants = (await self.api.get_grants(pb.GetGrantsRequest(session_token=token))).grants
        slices = [
            pb.BufferSlice(
                topic_id=grant.topic_id,
                partition=grant.partition,
                epoch=grant.epoch,
                base_offset=grant.registered_end,
                end_offset=grant.registered_end + self.rng.choice([5, 10]),
                record_count=5,
                size_bytes=100,
                producer_snapshot=b"p",
            )
            for grant in grants
        ]
        buffer_id = self.new_id()
        await self.api.announce_buffer(
            pb.AnnounceBufferRequest(session_token=token, buffer_id=buffer_id, slices=slices)
        )

    async def claim(self) -> None:
        claim = await self.api.claim_buffer(pb.ClaimBufferRequest(worker_id="w", claim_ttl_ms=500))
        if claim.found:
            self.claims.append(claim)

    async def register(self) -> None:
        if self.claims:
            claim = self.rng.choice(self.claims[-4:])
            segments = [
                types_pb2.SegmentRef(
                    segment_id=self.new_id(),
                    topic_id=item.topic_id,
                    partition=item.partition,
                    epoch=item.epoch,
                    base_offset=item.base_offset,
                    end_offset=item.end_offset,
                    record_count=1,
                    object_key=f"data/{claim.claim_id}",
                    size_bytes=100,
                )
                for item in claim.slices
            ]
            request = pb.RegisterSegmentsRequest(buffer_id=claim.buffer_id, segments=segments)
            await self.api.register_segments(request)

    async def declare(self) -> None:
        """Late and twice, too."""
        if self.claims:
            claim_id = self.rng.choice(self.claims[-4:]).claim_id
            self.objects.append(f"data/{claim_id}")
            await self.api.declare_uploads(pb.DeclareUploadsRequest(claim_id=claim_id, object_keys=self.objects[-1:]))

    async def sweep(self) -> None:
        """Whatever has been begun may be gone from the store at any moment."""
        grace_ms, confirm_ms = self.rng.choice([0, 300]), self.rng.choice([0, 300])
        request = pb.BeginDeletionRequest(object_keys=self.objects, grace_ms=grace_ms, confirm_ms=confirm_ms)
        answer = await self.api.begin_deletion(request)
        self.gone |= {item.object_key for item in answer.objects if item.verdict == pb.DELETION_VERDICT_BEGUN}
        if self.rng.random() < 0.5:
            done = [row.object_key for row in self.rows(t.DELETIONS) if row.begun_ms]
            await self.api.finish_deletion(pb.FinishDeletionRequest(object_keys=done))

    async def settle(self) -> None:
        token = self.session()
        grants = (await self.api.get_grants(pb.GetGrantsRequest(session_token=token))).grants
        ends = [
            pb.WalEnd(topic_id=g.topic_id, partition=g.partition, epoch=g.epoch, end_offset=g.registered_end)
            for g in grants
            if g.status == "moving" or self.rng.random() < 0.2
        ]
        await self.api.settle_ranges(pb.SettleRangesRequest(session_token=token, ends=ends))

    async def close(self) -> None:
        if self.rng.random() < 0.3:
            await self.api.close_session(pb.CloseSessionRequest(session_token=self.session()))

    async def beat(self) -> None:
        token = self.session()
        grants = (await self.api.get_grants(pb.GetGrantsRequest(session_token=token))).grants
        low = [
            pb.RangeUse(topic_id=g.topic_id, partition=g.partition, epoch=g.epoch, next_offset=g.registered_end)
            for g in grants
        ]
        await self.api.heartbeat(pb.HeartbeatRequest(session_token=token, low_ranges=low))

    async def expire(self) -> None:
        self.clock.advance(self.rng.choice([100, 400, 1100]))
        sweeper = Sweeper(self.context)
        await sweeper.sweep()
        await sweeper.expire_members()

    async def join(self) -> None:
        request = pb.JoinGroupRequest(group="g", topics=self.rng.choice([["t"], ["t", "u"]]), session_timeout_ms=1000)
        answer = await self.api.join_group(request)
        self.members[answer.member_id] = answer

    async def speak(self) -> None:
        if self.members:
            answer = self.members.pop(self.rng.choice(sorted(self.members)))
            request = pb.HeartbeatGroupRequest(
                group="g", member_id=answer.member_id, generation=answer.generation, owned=answer.assigned
            )
            self.members[answer.member_id] = await self.api.heartbeat_group(request)

    async def retain(self) -> None:
        await self.api.apply_retention(pb.ApplyRetentionRequest())

    def rows(self, table: t.Table[Any]) -> list[Any]:
        return list(self.store.tables.get(table.name, {}).values())

    def check(self) -> None:
        """What must hold after every command."""
        sessions = {row.session_id for row in self.rows(t.SESSIONS)}
        ranges: dict[tuple[str, int], list[t.RangeRow]] = {}
        for row in sorted(self.rows(t.RANGES), key=lambda row: row.epoch):
            ranges.setdefault((row.topic_id, row.partition), []).append(row)
        for of_partition in ranges.values():
            at = 0
            for row in of_partition:
                assert at <= row.start_offset <= row.registered_end <= (row.end_offset or row.limit_offset)
                at = row.end_offset if row.status == t.SETTLED and row.end_offset is not None else row.limit_offset
            assert all(row.status != t.OPEN for row in of_partition[:-1]), "only the newest epoch is led"
            assert of_partition[-1].status != t.OPEN or of_partition[-1].session_id in sessions
        spans: dict[tuple[str, int, int], list[t.SegmentRow]] = {}
        for row in sorted(self.rows(t.SEGMENTS), key=lambda row: row.base_offset):
            spans.setdefault((row.topic_id, row.partition, row.epoch), []).append(row)
        held = {row.key: row for row in self.rows(t.RANGES)}
        for key, segments in spans.items():
            assert segments[-1].end_offset == held[key].registered_end
            ends = [row.end_offset for row in segments[:-1]]
            assert ends == [row.base_offset for row in segments[1:]], "segments of a range lie side by side"
        assert self.gone.isdisjoint(row.object_key for row in self.rows(t.SEGMENTS)), "nothing dangles"
        assert {row.buffer_id for row in self.rows(t.BUFFERS)} == {row.buffer_id for row in self.rows(t.BUFFER_CLAIMS)}
        if sessions:
            open_now = {key for key, of_partition in ranges.items() if of_partition[-1].status == t.OPEN}
            assert open_now == {(row.topic_id, row.partition) for row in self.rows(t.PARTITIONS)}, (
                "nobody is leaderless"
            )


@pytest.mark.parametrize("seed", range(1, 15))
async def test_the_invariants_hold_under_random_commands_and_the_events_tell_it_all(seed: int) -> None:
    """G2, G4, G8: ranges are disjoint, segments lie side by side, none in an object that was deleted; replaying the
    events gives the same rows."""
    walk = Walk(seed)
    for _ in range(160):
        await walk.step()
        walk.check()
    before = {table.name: dict(walk.store.tables.get(table.name, {})) for table in t.PROJECTIONS}
    await walk.store.rebuild()
    assert {table.name: walk.store.tables.get(table.name, {}) for table in t.PROJECTIONS} == before
    assert sum(len(rows) for rows in before.values()) > 10
    await asyncio.sleep(0)
