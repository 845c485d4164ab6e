"""Whatever PostgreSQL answers, the coordinator goes on: it takes the answer for an absence, or for a defect of its own,
and asks again."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import asyncpg
import pytest
from shproto.errors import AWAY, Internal, InvalidArgument, StreamHouseError, Unavailable
from shproto.v1 import coordinator_pb2 as pb
from streamhouse_coordinator.wiring import CoordinatorService, build

PATIENCE_S = 60

Settings = Callable[..., Any]

# Answers that say something about the server or its machine. Not all of them have a class in asyncpg.
OF_THE_SERVER = [
    "XX000",  # internal error: what a full disk may look like, and a damaged file
    "XX001",  # data corrupted
    "XX002",  # index corrupted
    "53000", "53100", "53200", "53300", "53400",  # resources: disk full, out of memory, too many connections, a limit
    "58000", "58030", "58P01", "58P03",  # the system: an I/O error, a file that is missing, one whose name is too long
    "57014", "57P01", "57P02", "57P03", "57P05",  # an operator: cancelled, shut down, crashed, starting, idle for long
    "55P03", "55006",  # locks
    "40000", "40003",  # rolled back; committed or not
    "25006", "25P03", "25P04",  # read-only, idle in a transaction, a transaction that took too long
    "08000", "08006", "08P01",  # the connection
    "F0000",  # the configuration
    "XX999",  # one that nobody knows yet
]  # fmt: skip
OF_OURS = ["42P01", "42703", "0A000", "23514", "P0001"]

# What the loops look at: the sweeper writes `sweeps`, the heartbeat `session_leases`, the feed reads `events`.
WRITTEN = ("sweeps", "session_leases")
READ = ("events",)
# Something for the feed to read.
CLOSED = '{"session_id": "x", "agent_id": "x", "role": "query", "why": "closed"}'


class Sabotage:
    """Makes statements of the loops end with a SQLSTATE. PostgreSQL itself raises it, so it travels as any other."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection

    async def begin(self, state: str) -> None:
        run = self._connection.execute
        async with self._connection.transaction():
            for table in (*WRITTEN, *READ):
                await run(f"CREATE SEQUENCE hits_{table}")
            await run(
                "CREATE FUNCTION fail(hits regclass) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN "
                "PERFORM nextval(hits); "  # which no rollback takes back
                f"RAISE EXCEPTION 'injected' USING ERRCODE = '{state}'; END $$"
            )
            await run(
                "CREATE FUNCTION fail_write() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
                "PERFORM fail(('hits_' || TG_TABLE_NAME)::regclass); RETURN NEW; END $$"
            )
            for table in WRITTEN:
                await run(
                    f"CREATE TRIGGER sabotage BEFORE INSERT OR UPDATE ON {table} "
                    "FOR EACH STATEMENT EXECUTE FUNCTION fail_write()"
                )
            for table in READ:
                await run(f"ALTER TABLE {table} RENAME TO hidden_{table}")
                await run(f"CREATE VIEW {table} AS SELECT * FROM hidden_{table} WHERE fail('hits_{table}')")
            moved = "UPDATE event_position SET position = position + 1 RETURNING position"
            await run(
                f"WITH moved AS ({moved}) INSERT INTO hidden_events "
                f"SELECT position, 'agent/x', 1, 'SessionClosed', '{CLOSED}', '', 0 FROM moved"
            )

    async def hits(self) -> dict[str, int]:
        found = {}
        for table in (*WRITTEN, *READ):
            found[table] = await self._connection.fetchval(f"SELECT last_value FROM hits_{table} WHERE is_called") or 0
        return found

    async def end(self) -> None:
        run = self._connection.execute
        async with self._connection.transaction():
            for table in READ:
                await run(f"DROP VIEW {table}")
                await run(f"ALTER TABLE hidden_{table} RENAME TO {table}")
            for table in WRITTEN:
                await run(f"DROP TRIGGER sabotage ON {table}")


@pytest.mark.long
@pytest.mark.parametrize("state", [*OF_THE_SERVER, *OF_OURS])
async def test_no_loop_ends_over_an_answer(
    dsn: str, fast: Settings, connection: asyncpg.Connection, open_agent: Any, state: str
) -> None:
    service = build(fast(dsn, events_poll_interval_ms=20, heartbeat_interval_ms=20, session_sweep_interval_ms=20))
    await service.start()
    failed = asyncio.create_task(service.failed())
    try:
        await service.open_session("127.0.0.1:1")
        await service.api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=1))
        agent = await open_agent(service.api, "a")
        sabotage = Sabotage(connection)
        await sabotage.begin(state)
        with pytest.raises(StreamHouseError) as caught:
            await agent.heartbeat()
        if state in OF_THE_SERVER:
            assert isinstance(caught.value, Unavailable) and caught.value.details["database"] == AWAY
        else:
            assert isinstance(caught.value, Internal) and caught.value.details["sqlstate"] == state
        async with asyncio.timeout(PATIENCE_S):
            while min((await sabotage.hits()).values()) < 3 and not failed.done():
                await asyncio.sleep(0.02)
        assert not failed.done(), f"{state} ended the coordinator"
        await sabotage.end()
        await until_works(agent)
        await service.api.create_topic(pb.CreateTopicRequest(topic="later", partitions=1))
        events = service.api.follow_events(pb.FollowEventsRequest(after_position=0, types=["TopicCreated"]))
        async with asyncio.timeout(PATIENCE_S):
            topics = [await anext(events), await anext(events)]
        assert ["orders" in topics[0].payload_json, "later" in topics[1].payload_json] == [True, True]
        await events.aclose()
        assert not failed.done()
    finally:
        failed.cancel()
        await asyncio.wait([failed])
        await service.stop()


async def until_works(agent: Any) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with contextlib.suppress(StreamHouseError):
                await agent.heartbeat()
                return
            await asyncio.sleep(0.02)


async def test_numbers_and_texts_that_have_no_place_in_a_column_are_the_callers_mistake(
    coordinator: CoordinatorService,
) -> None:
    """Found by PostgreSQL (a NUL) or before it is asked (a number beyond int8); the connection stays in use."""
    store = coordinator.context.store
    for session_id, ttl_ms in (("a\0b", 1), ("a", 2**63)):
        with pytest.raises(StreamHouseError) as caught:
            await store.renew_session(session_id, ttl_ms)
        assert caught.value.reason == "INVALID_ARGUMENT"
    assert await store.renew_session("nobody", 1) is None


@pytest.mark.parametrize(
    ("call", "request_"),
    [
        ("open_session", pb.OpenSessionRequest(agent_id="a\nb", role="ingest", address="127.0.0.1:1")),
        ("open_session", pb.OpenSessionRequest(agent_id="a", role="query", address="127.0.0.1:1\n")),
        ("claim_buffer", pb.ClaimBufferRequest(worker_id="\x1b[2Jw", claim_ttl_ms=1000)),
        ("claim_compaction", pb.ClaimCompactionRequest(worker_id="w\r", claim_ttl_ms=1000)),
        ("join_group", pb.JoinGroupRequest(group="g\n", topics=["orders"])),
        ("join_group", pb.JoinGroupRequest(group="g", topics=["orders"], client_id="c\u2028")),
        ("join_group", pb.JoinGroupRequest(group="g", topics=["orders"], member_id="m\t")),
        ("commit_offsets", pb.CommitOffsetsRequest(group="g\n")),
        ("reset_offsets", pb.ResetOffsetsRequest(group="g\n", offsets=[pb.OffsetCommit(topic="orders")])),
    ],
)
async def test_names_that_would_not_stay_on_their_line_are_refused(
    coordinator: CoordinatorService, call: str, request_: Any
) -> None:
    with pytest.raises(InvalidArgument, match="control character"):
        await getattr(coordinator.api, call)(request_)
    status = await coordinator.api.get_status(pb.GetStatusRequest())
    assert not [session for session in status.sessions if session.role in ("ingest", "query")]
    assert not (await coordinator.api.list_groups(pb.ListGroupsRequest())).groups
