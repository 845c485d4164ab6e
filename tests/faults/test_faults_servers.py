"""Nemeses of PostgreSQL, RabbitMQ and Redis do what they say to the real servers, and undo it."""

import asyncio
import random
import shutil
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from tests.faults import shim
from tests.faults.fleet import Fleet, place_of
from tests.faults.history import Recorder
from tests.faults.nemeses import NEMESES
from tests.faults.nemeses import servers as nemeses
from tests.faults.nemesis import NotPossible
from tests.faults.postgres_proxy import AT_CONNECT, ERRORS, PostgresSession
from tests.faults.proxy import FaultProxy
from tests.integration import servers
from tests.integration.standby import PostgresPair, postgres_pair

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

DISK_BYTES = 320 * 1024 * 1024
AWAY = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError)
Controls = list[shim.Control]


@pytest.fixture(scope="module")
def controls() -> Controls:
    """Of PostgreSQL's clock, once it runs; empty without a C compiler."""
    return []


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, controls: Controls) -> Iterator[PostgresPair]:
    def variables(directory: Path) -> Mapping[str, str]:
        library = shim.build(tmp_path_factory.mktemp("shim"))
        if library is None:
            return {}
        controls.append(shim.Control(directory / "control"))
        return controls[0].environ(Path(shutil.copy(library, directory)))

    server = postgres_pair(DISK_BYTES, variables)
    yield server
    server.close()


@pytest.fixture
async def fleet(tmp_path: Path, pair: PostgresPair, controls: Controls) -> AsyncIterator[Fleet]:
    """No processes: PostgreSQL and a table of its own."""
    made = Fleet(tmp_path, Recorder(tmp_path / "history.jsonl"))
    made.servers["postgres"] = pair
    made.postgres_control = controls[0] if controls else None
    await execute(pair.url, "DROP TABLE IF EXISTS numbers", "CREATE TABLE numbers (n int, text text)")
    yield made
    made.recorder.close()


async def execute(dsn: str, *statements: str) -> Any:
    """The first value that the last of them gives."""
    async with asyncio.timeout(30):
        connection = await asyncpg.connect(dsn)
        try:
            for statement in statements[:-1]:
                await connection.execute(statement)
            return await connection.fetchval(statements[-1])
        finally:
            connection.terminate()


@pytest.mark.parametrize("name", ["postgres-kill", "postgres-restart", "postgres-failover"])
async def test_postgres_is_away_and_comes_back_with_what_it_had(fleet: Fleet, pair: PostgresPair, name: str) -> None:
    await execute(pair.url, "INSERT INTO numbers VALUES (7)")
    async with NEMESES[name](fleet, random.Random(1)):
        with pytest.raises(AWAY):
            await execute(pair.url, "SELECT 1")
    assert await execute(pair.url, "SELECT n FROM numbers") == 7


async def test_somebody_elses_transaction_holds_locks(fleet: Fleet, pair: PostgresPair) -> None:
    seen: set[str] = set()
    for seed in range(len(nemeses.LOCKS)):
        await execute(pair.url, "INSERT INTO numbers VALUES (1)")
        async with NEMESES["postgres-locks"](fleet, random.Random(seed)) as deed:
            seen.add(deed.text)
            with pytest.raises(asyncpg.LockNotAvailableError):
                await execute(pair.url, "SET lock_timeout = '100ms'", "UPDATE numbers SET n = n + 1")
            waiting = asyncio.create_task(execute(pair.url, "UPDATE numbers SET n = n + 1"))
            while not await execute(pair.url, "SELECT count(*) FROM pg_locks WHERE NOT granted"):
                await asyncio.sleep(0.01)
        await waiting
        assert deed.effect == "1 locks were waited for in the end"
    assert len(seen) == len(nemeses.LOCKS)


async def test_postgres_has_no_byte_left(fleet: Fleet, pair: PostgresPair) -> None:
    if pair.disk is None:
        with pytest.raises(NotPossible):
            async with NEMESES["postgres-disk-full"](fleet, random.Random(1)):
                pass
        pytest.skip("this machine does not allow to mount a tmpfs")
    write = "INSERT INTO numbers SELECT n, repeat('x', 2000) FROM generate_series(1, 20000) AS n"
    seen = set()
    for seed in range(2):
        async with NEMESES["postgres-disk-full"](fleet, random.Random(seed)) as deed:
            has_ended = "its log" in deed.text
            seen.add(has_ended)
            with pytest.raises(AWAY) as caught:
                await execute(pair.url, write)
            assert has_ended or isinstance(caught.value, asyncpg.DiskFullError | asyncpg.PostgresConnectionError)
        assert int(deed.effect.split()[2]) > 0
        await execute(pair.url, write)
        assert await execute(pair.url, "SELECT count(*) FROM numbers") == 20_000
        await execute(pair.url, "TRUNCATE numbers")
    assert seen == {False, True}


async def test_postgres_answers_with_errors(fleet: Fleet, pair: PostgresPair) -> None:
    seen: set[str] = set()
    proxies = []
    dsn = pair.url
    for place in place_of(pair.url).split(","):
        proxy = FaultProxy("postgres", place, lambda: PostgresSession(fleet.postgres_errors))
        await proxy.start()
        proxies.append(proxy)
        dsn = dsn.replace(place, proxy.address)
    connection = await asyncpg.connect(dsn)
    for seed in range(len(ERRORS)):
        async with NEMESES["postgres-errors"](fleet, random.Random(seed)) as deed:
            sqlstate = next(code for code in ERRORS if code in deed.text)
            seen.add(sqlstate)
            with pytest.raises(AWAY) as caught:
                for _ in range(500):
                    await (execute(dsn, "SELECT 1") if sqlstate == AT_CONNECT else connection.fetchval("SELECT 1"))
            if sqlstate != AT_CONNECT:  # who connects may then try the other place
                assert isinstance(caught.value, asyncpg.PostgresError) and caught.value.sqlstate == sqlstate
        assert int(deed.effect.split()[0]) > 0
        assert await connection.fetchval("SELECT 1") == await execute(dsn, "SELECT 1") == 1
    assert seen == ERRORS.keys()
    await connection.close()
    for proxy in proxies:
        await proxy.stop()


async def test_the_clock_of_postgres_jumps(fleet: Fleet, pair: PostgresPair) -> None:
    if fleet.postgres_control is None:
        with pytest.raises(NotPossible):
            async with NEMESES["clock-postgres"](fleet, random.Random(1)):
                pass
        pytest.skip("no C compiler")
    connection = await asyncpg.connect(pair.url)

    async def shift_s() -> float:
        now = "SELECT extract(epoch FROM clock_timestamp())::float"
        return float(await connection.fetchval(now)) - time.time()

    seen = []
    for seed in range(6):
        async with NEMESES["clock-postgres"](fleet, random.Random(seed)) as deed:
            said_s = float(deed.text.split()[-2])
            assert await shift_s() == pytest.approx(said_s, abs=0.9)
            seen.append(said_s)
        assert await shift_s() == pytest.approx(0, abs=0.9)
    assert min(seen) < 0 < max(seen)
    await connection.close()


@pytest.mark.parametrize(("name", "make"), [("rabbitmq", servers.rabbitmq_server), ("redis", servers.redis_server)])
async def test_a_helper_is_away_and_comes_back(fleet: Fleet, name: str, make: Any) -> None:
    server = fleet.servers[name] = await asyncio.to_thread(make)
    host, _, port = place_of(server.url).rpartition(":")

    async def is_there() -> bool:
        try:
            _, writer = await asyncio.open_connection(host, int(port))
        except ConnectionRefusedError:
            return False
        writer.close()
        return True

    try:
        for seed in range(2):
            async with NEMESES[name](fleet, random.Random(seed)):
                async with asyncio.timeout(30):
                    while await is_there():  # a node's children end a moment later
                        await asyncio.sleep(0.01)
            assert await is_there()
    finally:
        await asyncio.to_thread(server.close)
