"""The proxy in front of PostgreSQL answers with errors in its place: to the real client, of a real server."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import pytest

from tests.faults.postgres_proxy import AT_CONNECT, ERRORS, PostgresErrors, PostgresSession
from tests.faults.proxy import FaultProxy
from tests.integration import servers

pytestmark = pytest.mark.integration

STATEMENTS = sorted(ERRORS.keys() - {AT_CONNECT})


@pytest.fixture(scope="module")
def postgres() -> Iterator[servers.Server]:
    server = servers.postgres_server()
    yield server
    server.close()


@pytest.fixture
def errors() -> PostgresErrors:
    return PostgresErrors()


@pytest.fixture
async def dsn(postgres: servers.Server, errors: PostgresErrors) -> AsyncIterator[str]:
    """Through the proxy."""
    place = postgres.url.rpartition("@")[2].partition("/")[0]
    proxy = FaultProxy("postgres", place, lambda: PostgresSession(errors))
    await proxy.start()
    yield postgres.url.replace(place, proxy.address)
    await proxy.stop()


@pytest.fixture
async def client(dsn: str) -> AsyncIterator[Any]:
    connection = await asyncpg.connect(dsn)
    await connection.execute("DROP TABLE IF EXISTS numbers; CREATE TABLE numbers (n int)")
    yield connection
    await connection.close()


async def numbers(client: Any) -> list[int]:
    return [row["n"] for row in await client.fetch("SELECT n FROM numbers ORDER BY n")]


async def test_without_errors_the_proxy_is_not_there(client: Any) -> None:
    await client.executemany("INSERT INTO numbers VALUES ($1)", [(n,) for n in range(1000)])
    async with client.transaction():
        await client.execute("DELETE FROM numbers WHERE n >= $1", 3)
    with pytest.raises(asyncpg.UndefinedTableError):
        await client.fetch("SELECT * FROM nothing")
    assert await numbers(client) == [0, 1, 2]
    assert await client.fetchval("SELECT repeat('x', 3000000)") == "x" * 3_000_000


@pytest.mark.parametrize("sqlstate", STATEMENTS)
async def test_a_statement_gets_an_error_and_is_not_done(client: Any, errors: PostgresErrors, sqlstate: str) -> None:
    errors.begin(sqlstate)
    for statement in ("INSERT INTO numbers VALUES (1)", "SELECT 1"):
        with pytest.raises(asyncpg.PostgresError) as simple:
            await client.execute(statement)
        with pytest.raises(asyncpg.PostgresError) as prepared:
            await client.fetch(statement)
        assert {simple.value.sqlstate, prepared.value.sqlstate} == {sqlstate}
        assert str(simple.value) == ERRORS[sqlstate]
    errors.heal()
    assert await numbers(client) == []
    assert errors.touched[sqlstate] == 4


@pytest.mark.parametrize("ends_with", ["ROLLBACK", "COMMIT"])
async def test_a_transaction_that_met_an_error_is_rolled_back_however_it_ends(
    client: Any, errors: PostgresErrors, ends_with: str
) -> None:
    await client.execute("BEGIN")
    await client.execute("INSERT INTO numbers VALUES (1)")
    errors.begin("53100")
    with pytest.raises(asyncpg.DiskFullError):
        await client.execute("INSERT INTO numbers VALUES ($1)", 2)
    errors.heal()
    with pytest.raises(asyncpg.InFailedSQLTransactionError):
        await client.execute("INSERT INTO numbers VALUES (3)")
    assert await client.execute(ends_with) == "ROLLBACK"
    assert await numbers(client) == []
    async with client.transaction():
        await client.execute("INSERT INTO numbers VALUES (4)")
    assert await numbers(client) == [4]


async def test_who_connects_is_refused_and_who_is_connected_goes_on(
    dsn: str, client: Any, errors: PostgresErrors
) -> None:
    errors.begin(AT_CONNECT)
    with pytest.raises(asyncpg.TooManyConnectionsError):
        await asyncpg.connect(dsn)
    assert await numbers(client) == []
    errors.heal()
    await (await asyncpg.connect(dsn)).close()


async def test_a_part_of_the_statements_is_hit(client: Any, errors: PostgresErrors) -> None:
    errors.begin("58030", share=0.5, seed=3)
    for n in range(60):
        try:
            await client.execute("INSERT INTO numbers VALUES ($1)", n)
        except asyncpg.PostgresIOError:
            continue
    errors.heal()
    done = await numbers(client)
    assert 15 < len(done) < 45 and len(done) + errors.touched["58030"] == 60


async def test_bytes_may_come_in_any_pieces(postgres: servers.Server) -> None:
    """What a client sends is seen the same, cut anywhere."""
    rng = random.Random(4)
    place = postgres.url.rpartition("@")[2].partition("/")[0]
    errors = PostgresErrors()

    class Crumbs(PostgresSession):
        def up(self, data: bytes) -> tuple[bytes, bytes]:
            onward, answers = [], []
            while data:
                size_bytes = rng.randrange(1, 8)
                forward, answer = super().up(data[:size_bytes])
                onward.append(forward)
                answers.append(answer)
                data = data[size_bytes:]
            return b"".join(onward), b"".join(answers)

        def down(self, data: bytes) -> None:
            for at in range(len(data)):
                super().down(data[at : at + 1])

    proxy = FaultProxy("postgres", place, lambda: Crumbs(errors))
    await proxy.start()
    client = await asyncpg.connect(postgres.url.replace(place, proxy.address))
    try:
        assert await client.fetchval("SELECT $1::int + 1", 41) == 42
        errors.begin("XX000")
        with pytest.raises(asyncpg.InternalServerError):
            await client.fetchval("SELECT $1::int + 1", 41)
        errors.heal()
        assert await client.fetchval("SELECT $1::int + 1", 41) == 42
    finally:
        await client.close()
        await proxy.stop()


async def test_a_query_can_be_cancelled_through_it(client: Any) -> None:
    with pytest.raises(TimeoutError):
        await client.execute("SELECT pg_sleep(60)", timeout=0.2)
    async with asyncio.timeout(20):
        assert await numbers(client) == []
