"""What an engine may not do, its limits, and how it ends."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from shproto.errors import InvalidStatement, StatementFailed, StatementLimit, StreamHouseError
from shruntime.settings import SettingsError
from streamhouse_sql.adapters.duck import Duck, DuckLimits, open_temp_dir
from streamhouse_sql.ports import Interrupted

MIB = 1024 * 1024
ENDLESS = "SELECT count(*) FROM range(1000000000) AS a, range(1000000) AS b WHERE (a.range * b.range) % 7 = 3"


def duck(spill: Path, **limits: Any) -> Duck:
    defaults = {"memory_bytes_max": 256 * MIB, "temp_dir": spill, "temp_bytes_max": 64 * MIB, "threads": 1}
    return Duck(DuckLimits(**(defaults | limits)))


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Duck]:
    found = duck(tmp_path / "spill")
    yield found
    found.close()


def rows(engine: Duck, sql: str) -> list[tuple[Any, ...]]:
    _, batches = engine.result(sql, 1_000)
    return [row for batch in batches for row in zip(*batch.to_pydict().values(), strict=True)]


# ---- what it may not do; binding refuses most of it before


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_csv('{file}')",
        "SELECT * FROM read_text('{file}')",
        "SELECT * FROM read_json('{file}')",
        "SELECT * FROM '{file}'",
        "SELECT * FROM parquet_scan('{file}')",
        "SELECT * FROM glob('{file}')",
        "SELECT * FROM sqlite_scan('{file}', 't')",
        "SELECT * FROM read_csv('https://127.0.0.1:1/x.csv')",
        "SELECT * FROM read_parquet('s3://bucket/x')",
        "SELECT getenv('HOME')",
        "SELECT * FROM python_name",
        "SELECT nextval('none')",
    ],
)
def test_it_reads_no_file_and_no_network(engine: Duck, tmp_path: Path, sql: str) -> None:
    (tmp_path / "x.csv").write_text("a\nsecret\n")
    python_name = pa.table({"secret": ["x"]})  # a replacement scan would find it
    assert python_name.num_rows
    with pytest.raises(StreamHouseError) as error:
        rows(engine, sql.format(file=tmp_path / "x.csv"))
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "sql",
    [
        "COPY (SELECT 1) TO '{file}'",
        "EXPORT DATABASE '{file}'",
        "ATTACH '{file}' AS x",
        "CREATE TABLE t (a INTEGER)",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET memory_limit = '1TB'",
        "SET enable_external_access = true",
        "SET temp_directory = '/'",
        "SET lock_configuration = false",
        "RESET memory_limit",
        "PRAGMA threads = 100",
        "CALL pragma_version()",
        "CHECKPOINT",
        "SELECT 1; SELECT 2",
        "SELECT 1; SET threads = 100",
        "",
    ],
)
def test_only_a_single_query_runs(engine: Duck, tmp_path: Path, sql: str) -> None:
    for call in (engine.columns, engine.plan, lambda text: rows(engine, text)):
        with pytest.raises(InvalidStatement):
            call(sql.format(file=tmp_path / "x"))
    assert not (tmp_path / "x").exists()
    assert rows(engine, "SELECT current_setting('threads'), current_setting('lock_configuration')") == [(1, True)]


def test_its_settings_are_locked_also_for_its_own_connection(engine: Duck) -> None:
    for setting in (
        "memory_limit = '1TB'",
        "enable_external_access = true",
        "threads = 100",
        "TimeZone = 'Asia/Tokyo'",
    ):
        with pytest.raises(Exception, match=r"lock|disabled|Cannot"):
            engine._connection.execute(f"SET {setting}")


def test_it_knows_the_tables_that_it_was_given(engine: Duck) -> None:
    engine.add_table("scan_0", pa.table({"a": [1, 2]}))
    assert rows(engine, "SELECT sum(a) FROM scan_0") == [(3,)]
    engine.add_table("scan_0", pa.table({"b": [5]}))
    assert rows(engine, "SELECT * FROM scan_0") == [(5,)]
    with pytest.raises(InvalidStatement):
        rows(engine, "SELECT * FROM scan_1")


def test_times_are_utc(engine: Duck) -> None:
    assert rows(engine, "SELECT TIMESTAMPTZ '2026-01-01 00:00:00'::VARCHAR") == [("2026-01-01 00:00:00+00",)]


# ---- constants


@pytest.mark.parametrize(
    ("expression", "value_ms"),
    [
        ("'1970-01-01 00:00:01.5'", 1_500),
        ("TIMESTAMP '1970-01-01' + INTERVAL '2' SECOND", 2_000),
        ("DATE '1970-01-02'", 86_400_000),
        ("TIMESTAMPTZ '1970-01-01 01:00:00+01'", 0),
        ("NULL", None),
        ("'no time'", None),
        ("5", None),
        ("1 +", None),
        ("CAST('infinity' AS TIMESTAMP)", None),
        ("'-infinity'", None),
    ],
)
def test_a_constant_has_its_time_or_none(engine: Duck, expression: str, value_ms: int | None) -> None:
    assert engine.timestamp_ms(expression) == value_ms


# ---- errors


@pytest.mark.parametrize(
    ("sql", "kind", "said"),
    [
        ("SELECT 'x'::INTEGER", StatementFailed, "Could not convert string 'x' to INT32"),
        ("SELECT nofunction(1)", InvalidStatement, "Scalar Function with name nofunction does not exist"),
        ("SELECT a FROM scan_0 WHERE b = 1", InvalidStatement, 'Referenced column "b" not found'),
        ("SELECT FROM", InvalidStatement, 'syntax error at or near "FROM"'),
        ("SELECT * FROM scan_0 AS t, scan_0 AS t", InvalidStatement, "t"),
        ("SELECT 1::BIT::DATE", StatementFailed, "cast"),
        ("SELECT 99999999999::INTEGER", StatementFailed, "out of range"),
        ("SELECT list_value(1, 'x'::STRUCT(a INTEGER))", StreamHouseError, ""),
        ("SELECT (SELECT * FROM range(2))", StatementFailed, "More than one row"),
        ("SELECT max(_x) FROM scan_0", InvalidStatement, "_x"),
    ],
)
def test_an_error_is_of_the_statement_and_in_words(engine: Duck, sql: str, kind: type[Exception], said: str) -> None:
    engine.add_table("scan_0", pa.table({"a": [1]}))
    with pytest.raises(kind) as error:
        rows(engine, sql)
    assert said.lower() in str(error.value).lower()
    assert "LINE 1" not in str(error.value) and "Error:" not in str(error.value)


# ---- limits


def test_memory_beyond_the_limit_is_an_error_where_nothing_may_spill(tmp_path: Path) -> None:
    engine = duck(tmp_path, memory_bytes_max=16 * MIB, temp_bytes_max=0)
    with pytest.raises(StatementLimit, match="sql_memory_bytes_max") as error:
        rows(engine, "SELECT count(DISTINCT range) FROM range(5000000)")
    assert error.value.details["limit"] == "sql_memory_bytes_max"
    assert rows(engine, "SELECT 1") == [(1,)], "it goes on"
    engine.close()


def test_spill_files_have_a_limit_and_go_with_the_engine(tmp_path: Path) -> None:
    spill = tmp_path / "spill"
    engine = duck(spill, memory_bytes_max=32 * MIB, temp_bytes_max=16 * MIB)
    with pytest.raises(StatementLimit, match="sql_temp_bytes_max"):
        rows(
            engine,
            "SELECT sum(length(x)) FROM (SELECT repeat('x', 100) || range AS x FROM range(2000000) ORDER BY hash(x))",
        )
    engine.close()
    assert not spill.exists() or not list(spill.iterdir())


def test_a_query_that_spills_is_right(tmp_path: Path) -> None:
    spill = tmp_path / "spill"
    engine = duck(spill, memory_bytes_max=32 * MIB, temp_bytes_max=1024 * MIB)
    text = "SELECT repeat('x', 100) || lpad(range::VARCHAR, 9, '0') AS x FROM range(500000)"
    assert rows(engine, f"SELECT max(x) FROM (SELECT * FROM ({text}) ORDER BY hash(x))") == [("x" * 100 + "000499999",)]
    engine.close()
    assert not spill.exists() or not list(spill.iterdir())


def test_an_engine_that_is_closed_has_no_files_though_its_result_is_held(tmp_path: Path) -> None:
    """A client that does not take its result holds the iterator: the files went when the client did."""
    spill = tmp_path / "spill"
    engine = duck(spill, memory_bytes_max=32 * MIB, temp_bytes_max=1024 * MIB)
    text = "SELECT repeat('x', 100) || range AS x FROM range(1000000)"
    _, batches = engine.result(f"SELECT * FROM ({text}) ORDER BY hash(x)", 1_000)
    next(batches)
    assert list(spill.iterdir())
    engine.close()
    assert not spill.exists() or not list(spill.iterdir())
    with pytest.raises(Interrupted):
        next(batches)


def test_spill_files_are_in_a_directory_of_this_user_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        open_temp_dir(tmp_path / "a" / "spill")
        (tmp_path / "open").mkdir(0o777)
        open_temp_dir(tmp_path / "open")
    finally:
        os.umask(before)
    assert (tmp_path / "a" / "spill").stat().st_mode & 0o077 == (tmp_path / "open").stat().st_mode & 0o077 == 0
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=r"sql_temp_dir .*/file cannot be used: "):
        open_temp_dir(tmp_path / "file")


# ---- the end


def test_an_interrupt_ends_a_query_in_another_thread(engine: Duck) -> None:
    raised: list[Interrupted] = []

    def compute() -> None:
        try:
            rows(engine, ENDLESS)
        except Interrupted as error:
            raised.append(error)

    thread = threading.Thread(target=compute)
    thread.start()
    while thread.is_alive():
        engine.interrupt()  # again: one that comes before the query is lost
        thread.join(0.01)
    assert len(raised) == 1
    assert rows(engine, "SELECT 1") == [(1,)]


def test_an_interrupt_ends_a_result_that_is_being_taken(engine: Duck) -> None:
    _, batches = engine.result("SELECT * FROM range(100000000)", 1_000)
    next(batches)
    with pytest.raises(Interrupted):
        while True:
            engine.interrupt()
            next(batches)


def test_a_result_is_computed_as_it_is_taken(engine: Duck) -> None:
    taken = 0

    def source() -> Iterator[pa.RecordBatch]:
        nonlocal taken
        for _ in range(1_000):
            taken += 1
            yield pa.record_batch({"a": pa.array(range(10_000))})

    engine.add_table("scan_0", pa.RecordBatchReader.from_batches(pa.schema([("a", pa.int64())]), source()))
    _, batches = engine.result("SELECT a FROM scan_0", 1_000)
    next(batches)
    assert 0 < taken < 500
    for _ in range(100):
        next(batches)
    assert taken < 700


def test_a_fetched_result_keeps_to_the_memory_limit(tmp_path: Path) -> None:
    """DuckDB hands over Arrow memory that it does not count."""
    duck = Duck(DuckLimits(memory_bytes_max=64 << 20, temp_dir=tmp_path, temp_bytes_max=0, threads=1))
    rows = "SELECT i, repeat('x', 100) AS x FROM range({}) AS r(i)"
    try:
        assert duck.fetch(rows.format(1_000)).num_rows == 1_000
        with pytest.raises(StatementLimit, match="67108864 bytes"):
            duck.fetch(rows.format(1_000_000))
        other = duck.cursor()
        with pytest.raises(StatementLimit):
            other.fetch(rows.format(1_000_000))
        assert duck.fetch("SELECT 1 AS one").to_pydict() == {"one": [1]}, "the instance goes on"
    finally:
        duck.close()
