"""The SQL client against gRPC services that answer with given Arrow streams."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator

import pyarrow as pa
import pytest
from shproto.v1 import sql_pb2
from streamhouse import LiveColumns, Sql, errors, sync
from streamhouse import sql as client_sql

from client.tests.sql_service import Coordinator, SqlService, arrow_stream, batch, endless, plain_platform
from tests.bare import bare
from tests.platform.virtual_time import virtual_time

PATIENCE_S = 30.0
FIRST, SECOND = batch(n=[1, 2], name=["a", None]), batch(n=[3], name=["c"])
SCHEMA = FIRST.schema


@pytest.fixture
async def coordinator():
    async with Coordinator() as found:
        yield found


@pytest.fixture
async def service(coordinator):
    async with SqlService() as found:
        coordinator.sql_addresses.append(found.server.address)
        yield found


@pytest.fixture
async def sql(coordinator):
    async with Sql(coordinator.address, retry_timeout_ms=5_000) as client:
        yield client


async def ended(service: SqlService) -> str:
    return await asyncio.wait_for(service.ended.get(), PATIENCE_S)


async def test_batches_come_as_they_are_sent_with_schema_and_stats(service, sql):
    service.answers["SELECT 1"] = [FIRST, SECOND]
    result = sql("SELECT 1")
    assert result.schema is None and result.stats is None and result.statement == "SELECT 1"
    found = []
    async for item in result:
        assert result.schema == SCHEMA and result.stats is None
        found.append(item)
    assert found == [FIRST, SECOND]
    assert result.stats == client_sql.SqlStats(rows=3, records_scanned=30, bytes_scanned=2048, elapsed_ms=12)


def changes(**columns):
    """Returns changes of a live query as the service sends them."""
    described = {"streamhouse.live": json.dumps({"key_columns": ["carrier"], "is_changelog": True})}
    return pa.record_batch(columns, metadata=described)


async def test_a_live_query_gives_changes_until_the_loop_is_left(service, sql):
    rows = changes(_op=["+I", "-U"], carrier=["UA", "AA"])
    service.answers["SELECT 1 EMIT CHANGES"] = endless(rows.schema, [rows])
    result = sql("SELECT 1 EMIT CHANGES")
    assert result.live is None
    async for item in result:
        assert item == rows
        assert result.live == LiveColumns(key_columns=("carrier",), is_changelog=True)
        break
    assert await ended(service) == "cancelled"


async def test_the_result_of_a_live_query_has_no_end_to_wait_for(service, sql):
    rows = changes(_op=["+I"], carrier=["UA"])
    service.answers["SELECT 1 EMIT CHANGES"] = endless(rows.schema, [rows])
    with pytest.raises(errors.InvalidArgument, match="a live query has no end"):
        await sql("SELECT 1 EMIT CHANGES").to_pylist()
    assert await ended(service) == "cancelled"


async def test_what_a_service_says_of_a_live_query_is_checked(service, sql):
    rows = pa.record_batch({"n": [1]}, metadata={"streamhouse.live": "[]"})
    service.answers["SELECT 1"] = [rows]
    with pytest.raises(errors.Internal, match="said of a live query"):
        await sql("SELECT 1").to_arrow()


async def test_a_result_without_rows_has_its_columns(service, sql):
    service.answers["SELECT 1"] = SCHEMA.empty_table()
    result = sql("SELECT 1")
    assert [item async for item in result] == []
    assert result.schema == SCHEMA and result.stats.rows == 0
    assert (await sql("SELECT 1").to_arrow()).schema == SCHEMA


async def test_a_whole_result_as_arrow_and_as_rows(service, sql):
    service.answers["SELECT 1"] = [FIRST, SECOND]
    result = sql("SELECT 1")
    assert await result.to_arrow() == pa.Table.from_batches([FIRST, SECOND])
    assert result.stats.rows == 3
    assert await sql("SELECT 1").to_pylist() == [
        {"n": 1, "name": "a"},
        {"n": 2, "name": None},
        {"n": 3, "name": "c"},
    ]


async def test_rows_with_a_name_twice_are_refused_since_a_dict_would_lose_a_column(service, sql):
    twice = pa.table([[1], [2]], names=["n", "n"])
    service.answers["SELECT 1"] = twice
    assert await sql("SELECT 1").to_arrow() == twice
    with pytest.raises(errors.InvalidArgument, match="two columns of the result are named 'n'"):
        await sql("SELECT 1").to_pylist()


@pytest.mark.parametrize("package", ["pandas", "polars"])
async def test_data_frames_come_where_their_package_is_installed(service, sql, package):
    service.answers["SELECT 1"] = [FIRST]
    try:
        __import__(package)
    except ModuleNotFoundError:
        with pytest.raises(ModuleNotFoundError, match=f"to_{package}.. needs {package}.*pip install {package}"):
            await getattr(sql("SELECT 1"), f"to_{package}")()
        assert not service.asked, "a statement must not run for nothing"
    else:
        frame = await getattr(sql("SELECT 1"), f"to_{package}")()
        assert list(frame.columns) == ["n", "name"] and len(frame) == 2


async def test_a_result_is_read_once(service, sql):
    service.answers["SELECT 1"] = [FIRST]
    result = sql("SELECT 1")
    await result.to_arrow()
    with pytest.raises(errors.InvalidArgument, match="read already"):
        await result.to_arrow()
    assert service.statements == ["SELECT 1"]


async def test_a_loop_that_is_left_ends_the_statement(service, sql):
    service.answers["SELECT 1"] = endless(SCHEMA, [FIRST])
    async for item in sql("SELECT 1"):
        assert item == FIRST
        break
    assert await ended(service) == "cancelled"


async def test_a_loop_that_is_left_ends_the_statement_also_while_the_result_is_kept(service, sql):
    service.answers["SELECT 1"] = endless(SCHEMA, [FIRST])
    result = sql("SELECT 1")
    async for _ in result:
        break
    assert await ended(service) == "cancelled"
    assert result.schema == SCHEMA and result.stats is None


@pytest.mark.parametrize("first", [True, False])
async def test_cancelling_the_reader_ends_the_statement(service, sql, first):
    begun = asyncio.Event()

    async def responses() -> AsyncIterator[sql_pb2.ExecuteResponse]:
        if first:
            yield sql_pb2.ExecuteResponse(arrow_stream=arrow_stream(SCHEMA, [FIRST]))
        begun.set()
        await asyncio.Event().wait()
        yield

    service.answers["SELECT 1"] = responses
    reading = asyncio.create_task(sql("SELECT 1").to_arrow())
    await asyncio.wait_for(begun.wait(), PATIENCE_S)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert await ended(service) == "cancelled"


async def test_closing_the_client_ends_its_statements(coordinator, service):
    service.answers["SELECT 1"] = endless(SCHEMA, [FIRST])
    async with Sql(coordinator.address) as sql:
        batches = aiter(sql("SELECT 1"))
        assert await anext(batches) == FIRST
    with pytest.raises(errors.Unavailable, match="closed"):
        await anext(batches)
    assert await ended(service) == "cancelled"


async def test_errors_are_those_of_the_service(service, sql):
    service.answers["SELECT x"] = errors.InvalidStatement("there is no column x", line=1, column=8)
    with pytest.raises(errors.InvalidStatement, match="no column x") as caught:
        await sql("SELECT x").to_arrow()
    assert caught.value.details == {"line": "1", "column": "8"}
    assert service.statements == ["SELECT x"]


async def test_an_error_in_the_middle_comes_behind_the_batches_before_it(service, sql):
    async def responses() -> AsyncIterator[sql_pb2.ExecuteResponse]:
        yield sql_pb2.ExecuteResponse(arrow_stream=arrow_stream(SCHEMA, [FIRST]))
        raise errors.Unavailable("a range is missing")

    service.answers["SELECT 1"] = responses
    found = []
    with pytest.raises(errors.Unavailable, match="a range is missing"):
        async for item in sql("SELECT 1"):
            found.append(item)
    assert found == [FIRST]
    assert service.statements == ["SELECT 1"], "never again after the first response"


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (b"nonsense", "no Arrow stream"),
        (arrow_stream(SCHEMA, [FIRST])[:-100], "no Arrow stream"),
        (arrow_stream(batch(m=[1]).schema, [batch(m=[1])]), "changed the columns"),
    ],
)
async def test_a_damaged_response_is_an_error(service, sql, second, said):
    async def responses() -> AsyncIterator[sql_pb2.ExecuteResponse]:
        yield sql_pb2.ExecuteResponse(arrow_stream=arrow_stream(SCHEMA, [FIRST]))
        yield sql_pb2.ExecuteResponse(arrow_stream=second)

    service.answers["SELECT 1"] = responses
    with pytest.raises(errors.Internal, match=said):
        await sql("SELECT 1").to_arrow()
    assert await ended(service) in ("cancelled", "done")


async def test_an_answer_without_a_response_is_an_error(service, sql):
    async def responses() -> AsyncIterator[sql_pb2.ExecuteResponse]:
        for response in ():
            yield response

    service.answers["SELECT 1"] = responses
    with pytest.raises(errors.Internal, match="without a schema"):
        await sql("SELECT 1").to_arrow()


# ---- time


async def test_the_time_limit_goes_to_the_service(service, sql):
    service.answers["SELECT 1"] = [FIRST]
    await sql("SELECT 1").to_arrow()
    await sql("SELECT 1", timeout_ms=1_500).to_arrow()
    assert [request.timeout_ms for request in service.asked] == [0, 1_500]


@pytest.mark.parametrize("first", [True, False])
async def test_a_service_that_hangs_is_left_when_the_time_is_over(coordinator, service, first):
    async def responses() -> AsyncIterator[sql_pb2.ExecuteResponse]:
        if first:
            yield sql_pb2.ExecuteResponse(arrow_stream=arrow_stream(SCHEMA, [FIRST]))
        await asyncio.Event().wait()
        yield

    service.answers["SELECT 1"] = responses
    async with Sql(coordinator.address, request_timeout_ms=500) as sql:
        with pytest.raises(errors.StatementTimeout, match="timeout_ms = 10"):
            await sql("SELECT 1", timeout_ms=10).to_arrow()
    assert await ended(service) == "cancelled"


async def test_time_that_the_application_takes_does_not_count():
    async def responses() -> AsyncIterator[sql_pb2.ExecuteResponse]:
        for wait_s in (0.6, 0.3, 0.2):
            await asyncio.sleep(wait_s)
            yield sql_pb2.ExecuteResponse()

    with virtual_time():
        limit, stream = client_sql._WaitLimit(900, 100), responses()
        for _ in range(2):
            assert await limit.next_of(stream) is not None
            await asyncio.sleep(60)
        with pytest.raises(errors.StatementTimeout):
            await limit.next_of(stream)


@pytest.mark.parametrize("timeout_ms", [0, -1, 1.5, "1", 1 << 40])
async def test_a_time_limit_out_of_its_limits_is_refused(sql, timeout_ms):
    with pytest.raises(errors.InvalidArgument, match="timeout_ms"):
        sql("SELECT 1", timeout_ms=timeout_ms)


@pytest.mark.parametrize("statement", [b"SELECT 1", None, "SELECT '\udc80'"])
async def test_a_statement_that_is_no_text_is_refused(sql, statement):
    with pytest.raises(errors.InvalidArgument, match="statement"):
        sql(statement)


# ---- several services


async def test_services_take_statements_in_turn(coordinator, sql):
    async with SqlService() as one, SqlService() as two, SqlService() as three:
        for service in (one, two, three):
            service.answers["SELECT 1"] = [FIRST]
            coordinator.sql_addresses.append(service.server.address)
        for _ in range(6):
            await sql("SELECT 1").to_arrow()
        assert [len(service.asked) for service in (one, two, three)] == [2, 2, 2]
        assert coordinator.lookups == 1


async def test_a_service_that_is_gone_is_passed_over(coordinator, service, sql):
    async with SqlService() as gone:
        coordinator.sql_addresses.insert(0, gone.server.address)
    service.answers["SELECT 1"] = [FIRST]
    for _ in range(2):  # each is first once
        assert await sql("SELECT 1").to_arrow() == pa.Table.from_batches([FIRST])
    assert service.statements == ["SELECT 1"] * 2


async def test_a_service_that_had_no_room_is_asked_again(service, sql):
    service.answers["INSERT INTO a SELECT 1"] = [FIRST]
    service.refusals += [errors.Overloaded("full", retry_after_ms=1, limit="x", value=1)]
    await sql("INSERT INTO a SELECT 1").to_arrow()
    assert service.statements == ["INSERT INTO a SELECT 1"] * 2


async def test_a_service_that_stops_may_have_done_a_statement_that_writes(service, sql):
    service.answers["SELECT 1"] = [FIRST]
    service.refusals += [errors.ShuttingDown("going")] * 3
    assert (await sql("SELECT 1").to_arrow()).num_rows == 2
    assert len(service.asked) == 4
    service.refusals += [errors.ShuttingDown("going")]
    with pytest.raises(errors.ShuttingDown):
        await sql("INSERT INTO a SELECT 1").to_arrow()
    assert len(service.asked) == 5


async def test_a_statement_that_reads_is_sent_again_once_after_a_lost_answer(service, sql):
    service.answers["SELECT 1"] = [FIRST]
    service.refusals += [errors.Unavailable("PostgreSQL is away")]
    assert (await sql("SELECT 1").to_arrow()).num_rows == 2
    assert len(service.asked) == 2
    service.refusals += [errors.Unavailable("it is the statement")] * 2
    with pytest.raises(errors.Unavailable, match="it is the statement"):
        await sql("SELECT 1").to_arrow()
    assert len(service.asked) == 4


async def test_a_statement_that_writes_is_not_sent_again_after_a_lost_answer(service, sql):
    service.refusals += [errors.Unavailable("lost")]
    with pytest.raises(errors.Unavailable, match="lost"):
        await sql("CREATE TABLE t (a INT)").to_arrow()
    assert len(service.asked) == 1


@pytest.mark.parametrize(
    ("statement", "reads"),
    [
        ("SELECT 1", True),
        ("  -- a comment\n/* and\nanother */ (select 1)", True),
        ("WITH a AS (SELECT 1) SELECT * FROM a", True),
        ("show tables", True),
        ("DESCRIBE t", True),
        ("EXPLAIN SELECT 1", True),
        ("WITH a AS (SELECT 1) INSERT INTO t SELECT * FROM a", False),
        ("EXPLAIN ANALYZE INSERT INTO t SELECT 1", False),
        ("CREATE TABLE t (a INT)", False),
        ("selected", False),
        ("-- SELECT 1", False),
        ("", False),
    ],
)
def test_a_statement_reads_if_it_certainly_changes_nothing(statement, reads):
    assert client_sql._only_reads(statement) is reads


async def test_without_a_service_the_error_says_how_to_start_one(coordinator, sql):
    with pytest.raises(errors.Unavailable, match=r"no SQL service runs: `streamhouse serve`.*sql-worker") as caught:
        await sql("SELECT 1").to_arrow()
    assert caught.value.permanent and not caught.value.maybe_done


async def test_a_service_that_comes_late_is_found(coordinator, sql):
    async with SqlService() as service:
        service.answers["SELECT 1"] = [FIRST]
        with pytest.raises(errors.Unavailable):
            await sql("SELECT 1").to_arrow()
        coordinator.sql_addresses.append(service.server.address)
        assert (await sql("SELECT 1").to_arrow()).num_rows == 2


async def test_services_that_stay_away_are_unavailable_after_the_retry_timeout(coordinator):
    async with SqlService() as gone:
        coordinator.sql_addresses.append(gone.server.address)
    async with Sql(coordinator.address, retry_timeout_ms=200) as sql:
        with pytest.raises(errors.Unavailable, match="no SQL service took the statement within retry_timeout_ms = 200"):
            await sql("SELECT 1").to_arrow()
    assert coordinator.lookups >= 1


async def test_another_server_at_the_address_is_said_at_once(coordinator, sql):
    coordinator.sql_addresses.append(coordinator.address)  # a coordinator answers UNIMPLEMENTED
    with pytest.raises(errors.Unavailable, match="another server"):
        await sql("SELECT 1").to_arrow()


# ---- plain code


@pytest.fixture
def plain():
    with plain_platform() as found:
        yield found


def test_plain_code_reads_batches_and_whole_results(plain):
    address, service = plain.address, plain.service
    service.answers["SELECT 1"] = [FIRST, SECOND]
    with sync.Sql(address) as sql:
        result = sql("SELECT 1", timeout_ms=60_000)
        assert list(result) == [FIRST, SECOND]
        assert result.stats.rows == 3 and result.schema == SCHEMA and result.statement == "SELECT 1"
        assert sql("SELECT 1").to_arrow().num_rows == 3
        assert sql("SELECT 1").to_pylist()[0] == {"n": 1, "name": "a"}
        with pytest.raises(errors.InvalidStatement):
            list(sql("SELECT 2"))


def test_a_plain_loop_that_is_left_ends_the_statement(plain):
    address, service = plain.address, plain.service
    service.answers["SELECT 1"] = endless(SCHEMA, [FIRST])
    with sync.Sql(address) as sql:
        for item in sql("SELECT 1"):
            assert item == FIRST
            break
        assert plain.ended() == "cancelled"


def test_the_plain_and_the_asynchronous_class_name_each_other():
    with pytest.raises(TypeError, match="Sql is asynchronous: use `async with`"), Sql("127.0.0.1:1"):
        pass
    with pytest.raises(TypeError, match=r"use `async for`, or in plain code streamhouse.sync.Sql"):
        for _ in client_sql.SqlResult(None, "SELECT 1", None):  # type: ignore[arg-type, attr-defined]
            pass


PLAIN = """
import sys
from streamhouse.sync import Sql

sql = Sql(sys.argv[1])
rows = iter(sql("SELECT 1"))
print(next(rows).num_rows)
"""


def test_a_program_that_ends_inside_a_result_ends_quietly(plain):
    """The result is a global, so that it lives until the interpreter is taken apart."""
    address, service = plain.address, plain.service
    service.answers["SELECT 1"] = endless(SCHEMA, [FIRST])
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, address], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "2\n", "")
    assert plain.ended() == "cancelled"


# ---- without the extra


def test_without_pyarrow_the_error_names_the_extra():
    source = "from streamhouse.sync import Sql\nSql('127.0.0.1:1')('SELECT 1')"
    done = subprocess.run(bare(source), capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith(
        "Sql needs pyarrow, which is not installed: pip install '.[sql]' in a checkout of StreamHouse\n"
    )


def test_the_client_imports_no_pyarrow_before_it_is_used():
    source = "import sys, streamhouse.sql, streamhouse.sync; sys.exit('pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", source], timeout=PATIENCE_S, check=False).returncode == 0
