"""SQL end to end: the SDK, gRPC, `streamhouse serve`, its log, its segments, its directory."""

import asyncio
import json
from pathlib import Path

import pytest
from streamhouse import Admin, Producer, Sql
from streamhouse.errors import InvalidStatement, StatementTimeout
from streamhouse.sync import Sql as PlainSql
from streamhouse_cli.serve_process import ServeProcess

from tests.integration.processes import EmbeddedProcess

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

RECORDS = 20_000
DECLARE = (
    "CREATE TABLE payments (amount INTEGER, customer VARCHAR METADATA FROM 'key', "
    "paid TIMESTAMPTZ METADATA FROM 'timestamp') WITH (topic = 'raw')"
)
PER_CUSTOMER = (
    "SELECT customer, count(*) AS payments, sum(amount)::BIGINT AS amount FROM payments GROUP BY customer ORDER BY ALL"
)
ENDLESS = "SELECT count(*) FROM range(1000000000) AS a, range(1000000) AS b WHERE (a.range * b.range) % 7 = 3"


def expected(count: int) -> list[dict[str, object]]:
    customers = [f"customer-{number}" for number in range(7)]
    return [
        {"customer": customer, "payments": len(range(i, count, 7)), "amount": sum(range(i, count, 7))}
        for i, customer in enumerate(customers)
    ]


async def produce(address: str, first: int, last: int, acks: str) -> None:
    async with Producer(address, acks=acks) as producer:
        values = [json.dumps({"amount": number}).encode() for number in range(first, last)]
        keys = [b"customer-%d" % (number % 7) for number in range(first, last)]
        await (await producer.send_many("raw", values, keys=keys))


async def test_the_log_is_queried_while_it_is_written_and_after_a_kill(tmp_path: Path) -> None:
    """Rows are those that were acknowledged, from log and segments; a declared table outlives the process."""
    server = EmbeddedProcess(tmp_path / "data", tmp_path, {"STREAMHOUSE_SEAL_AGE_MS": "300"})
    await server.start_serving()
    try:
        async with Admin(server.address) as admin, Sql(server.address) as sql:
            await admin.create_topic("raw", partitions=3)
            await sql(DECLARE).to_pylist()
            assert await sql(PER_CUSTOMER).to_pylist() == []
            for first in range(0, RECORDS, 5_000):
                await produce(server.address, first, first + 5_000, "durable" if first % 10_000 else "wal")
                assert await sql(PER_CUSTOMER).to_pylist() == expected(first + 5_000), "acknowledged is there"
            result = sql("SELECT _partition, max(_offset) AS last FROM raw GROUP BY 1 ORDER BY 1")
            ends = await result.to_pylist()
            assert sum(row["last"] + 1 for row in ends) == RECORDS
            assert result.stats is not None and result.stats.records_scanned == RECORDS
            half = sql(f"SELECT count(*) AS n FROM raw WHERE _partition = 0 AND _offset >= {ends[0]['last'] - 9}")
            assert await half.to_pylist() == [{"n": 10}]
            assert half.stats is not None and half.stats.records_scanned < RECORDS / 2
            with pytest.raises(InvalidStatement, match="did you mean 'payments'"):
                await sql("SELECT * FROM payment").to_arrow()
            with pytest.raises(StatementTimeout):
                await sql(ENDLESS, timeout_ms=100).to_arrow()
        server.kill()
        await server.start_serving()
        async with Sql(server.address) as sql:
            assert await sql(PER_CUSTOMER).to_pylist() == expected(RECORDS)
            statements = [asyncio.create_task(sql(ENDLESS).to_arrow()) for _ in range(3)]
            await asyncio.sleep(0)
            assert await sql("SELECT 1 AS one").to_pylist() == [{"one": 1}], "beside three that compute"
            for statement in statements:
                statement.cancel()
            await asyncio.wait(statements)
            assert await sql(PER_CUSTOMER).to_pylist() == expected(RECORDS)
    finally:
        code = await server.stop()
    assert code == 0, server.log_tail()
    assert not list((tmp_path / "data" / "sql" / "spill").glob("*")), "nothing spilled is left"


def test_a_stop_ends_a_statement_that_computes(tmp_path: Path) -> None:
    with ServeProcess(tmp_path / "data", tmp_path / "serve.log") as serve, PlainSql(serve.address) as sql:
        rows = iter(sql("SELECT range AS n FROM range(1000000000000)"))
        assert next(rows).num_rows > 0
        serve.stop()
        with pytest.raises(Exception, match=r"stopping|connect|Unavailable|UNAVAILABLE|closed|reset|answer"):
            for _ in rows:
                pass
