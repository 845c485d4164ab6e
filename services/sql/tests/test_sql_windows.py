"""Windows over event time, compared with the same windows computed row by row."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from shformat import Records
from shproto.errors import InvalidStatement
from streamhouse_sql.adapters.duck import Duck, DuckLimits
from streamhouse_sql.arrow import to_arrow
from streamhouse_sql.core.binding import bind
from streamhouse_sql.core.statement import Query, parse
from streamhouse_sql.core.windows import WINDOWS_PER_ROW_MAX

pytestmark = pytest.mark.quick

Row = tuple[Any, ...]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Duck]:
    directory: Path = tmp_path_factory.mktemp("spill")
    found = Duck(DuckLimits(memory_bytes_max=1 << 28, temp_dir=directory, temp_bytes_max=1 << 28, threads=1))
    yield found
    found.close()


def run(engine: Duck, text: str, times_ms: list[int], keys: list[bytes | None] | None = None) -> list[Row]:
    """Returns the rows of a query over the topic `t` with records of these times."""
    query = parse(text)
    assert isinstance(query, Query)
    found = bind(query, ["t"], {})
    records = Records.from_lists([b"v"] * len(times_ms), keys=keys, timestamps_ms=times_ms)
    for scan in found.scans:
        engine.add_table(scan.name, to_arrow("t", 0, records, scan.columns or ("_offset",)))
    _, batches = engine.result(found.sql, 1_000)
    return [row for batch in batches for row in zip(*(column.to_pylist() for column in batch.columns), strict=True)]


def windows(engine: Duck, call: str, times_ms: list[int], keys: list[bytes | None] | None = None) -> list[Row]:
    """Returns (offset, start, end, time) in ms of each row of a window function."""
    text = (
        f"SELECT _offset, epoch_ms(window_start), epoch_ms(window_end), epoch_ms(window_time) FROM {call} ORDER BY ALL"
    )
    return run(engine, text, times_ms, keys)


def with_time(rows: list[Row]) -> list[Row]:
    return sorted((*row, row[2] - 1) for row in rows)


def times(seed: int) -> list[int]:
    rng = random.Random(seed)
    edges = [0, -1, 1, 59_999, 60_000, 60_001, -60_000, 3_600_000]
    return edges + [rng.randint(-200_000, 200_000) for _ in range(40)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("size", "offset"), [(60, 0), (60, 7), (7, 0), (1, 0), (86_400, 3_600), (60, 67)])
def test_tumble(engine: Duck, seed: int, size: int, offset: int) -> None:
    rows = times(seed)
    shift = f", INTERVAL '{offset}' SECOND" if offset else ""
    expected = []
    for number, ms in enumerate(rows):
        start = (ms - offset * 1_000) // (size * 1_000) * (size * 1_000) + offset * 1_000
        expected.append((number, start, start + size * 1_000))
    call = f"TUMBLE(TABLE t, DESCRIPTOR(_timestamp), INTERVAL '{size}' SECOND{shift})"
    assert windows(engine, call, rows) == with_time(expected)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("slide", "size"), [(10, 60), (60, 60), (7, 21), (1, 5)])
def test_hop(engine: Duck, seed: int, slide: int, size: int) -> None:
    rows = times(seed)
    expected = []
    for number, ms in enumerate(rows):
        last = ms // (slide * 1_000) * (slide * 1_000)
        starts = [last - i * slide * 1_000 for i in range(size // slide)]
        assert all(start <= ms < start + size * 1_000 for start in starts)
        expected += [(number, start, start + size * 1_000) for start in starts]
    call = f"HOP(TABLE t, DESCRIPTOR(_timestamp), INTERVAL '{slide}' SECOND, INTERVAL '{size}' SECOND)"
    assert windows(engine, call, rows) == with_time(expected)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("step", "size"), [(10, 60), (60, 60), (7, 21)])
def test_cumulate(engine: Duck, seed: int, step: int, size: int) -> None:
    rows = times(seed)
    expected = []
    for number, ms in enumerate(rows):
        start = ms // (size * 1_000) * (size * 1_000)
        ends = [start + i * step * 1_000 for i in range(1, size // step + 1)]
        expected += [(number, start, end) for end in ends if ms < end]
    call = f"CUMULATE(TABLE t, DESCRIPTOR(_timestamp), INTERVAL '{step}' SECOND, INTERVAL '{size}' SECOND)"
    assert windows(engine, call, rows) == with_time(expected)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("gap", [1, 5, 60])
@pytest.mark.parametrize("by_key", [False, True])
def test_session(engine: Duck, seed: int, gap: int, by_key: bool) -> None:
    rng = random.Random(seed)
    rows = times(seed)
    keys = [rng.choice([b"a", b"b", None]) for _ in rows]
    expected = []
    for key in [b"a", b"b", None] if by_key else [...]:
        mine = sorted((ms, number) for number, ms in enumerate(rows) if not by_key or keys[number] == key)
        sessions: list[list[tuple[int, int]]] = []
        for ms, number in mine:
            if sessions and ms - sessions[-1][-1][0] <= gap * 1_000:
                sessions[-1].append((ms, number))
            else:
                sessions.append([(ms, number)])
        for session in sessions:
            start, end = session[0][0], session[-1][0] + gap * 1_000
            expected += [(number, start, end) for _, number in session]
    by = " PARTITION BY _key" if by_key else ""
    call = f"SESSION(TABLE t{by}, DESCRIPTOR(_timestamp), INTERVAL '{gap}' SECOND)"
    assert windows(engine, call, rows, keys) == with_time(expected)


def test_sessions_of_several_keys(engine: Duck) -> None:
    call = "SESSION(TABLE t PARTITION BY _key, _partition, DESCRIPTOR(_timestamp), INTERVAL '1' SECOND)"
    found = windows(engine, call, [0, 500, 900, 5_000], [b"a", b"b", b"a", b"a"])
    assert [row[:3] for row in found] == [(0, 0, 1_900), (1, 500, 1_500), (2, 0, 1_900), (3, 5_000, 6_000)]


@pytest.mark.parametrize(
    "call",
    [
        "TUMBLE(TABLE t, DESCRIPTOR(_timestamp), INTERVAL '1' MINUTE)",
        "tumble(t, _timestamp, INTERVAL '1' MINUTE)",
        "TABLE(TUMBLE(TABLE t, DESCRIPTOR(_timestamp), INTERVAL '1 minute'))",
        "TUMBLE(DATA => TABLE t, TIMECOL => DESCRIPTOR(_timestamp), SIZE => INTERVAL '60' SECONDS)",
        "TUMBLE(SIZE => INTERVAL 1 MINUTE, TIMECOL => DESCRIPTOR(_timestamp), DATA => TABLE t)",
        "TUMBLE(TABLE (SELECT * FROM t), DESCRIPTOR(_timestamp), INTERVAL '1' MINUTE)",
        "TUMBLE(TABLE \"t\", DESCRIPTOR(\"_timestamp\"), INTERVAL '1' MINUTE, INTERVAL '0' SECOND)",
    ],
)
def test_a_call_may_be_written_in_several_ways(engine: Duck, call: str) -> None:
    assert windows(engine, call, [0, 61_000]) == [(0, 0, 60_000, 59_999), (1, 60_000, 120_000, 119_999)]


def test_windows_are_grouped_and_joined_as_any_table(engine: Duck) -> None:
    text = """
        SELECT epoch_ms(w.window_start), count(*), count(*) FILTER (WHERE w._offset > 0)
        FROM TUMBLE(TABLE t, DESCRIPTOR(_timestamp), INTERVAL '1' MINUTE) AS w
        JOIN t AS again USING (_offset)
        WHERE again._offset < 3 GROUP BY w.window_start, w.window_end ORDER BY 1
    """
    assert run(engine, text, [0, 1, 60_000, 60_001]) == [(0, 2, 1), (60_000, 1, 1)]


def test_only_the_columns_that_are_named_are_read() -> None:
    def columns(text: str) -> tuple[str, ...]:
        query = parse(text)
        assert isinstance(query, Query)
        (scan,) = bind(query, ["t"], {}).scans
        return scan.columns

    call = "TUMBLE(TABLE t, DESCRIPTOR(_timestamp), INTERVAL '1' MINUTE)"
    assert columns(f"SELECT window_start, count(*) FROM {call} GROUP BY 1") == ("_timestamp",)
    assert columns(f"SELECT window_start, max(_offset) FROM {call} GROUP BY 1") == ("_offset", "_timestamp")
    assert len(columns(f"SELECT * FROM {call}")) == 8
    sessions = "SESSION(TABLE t PARTITION BY _key, DESCRIPTOR(_timestamp), INTERVAL '1' MINUTE)"
    assert columns(f"SELECT count(*) FROM {sessions}") == ("_key", "_timestamp")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("TUMBLE(TABLE t, DESCRIPTOR(_timestamp))", "TUMBLE needs SIZE: TUMBLE(TABLE name, DESCRIPTOR(time column)"),
        ("TUMBLE()", "TUMBLE needs DATA, TIMECOL, SIZE"),
        ("TUMBLE(TABLE t, DESCRIPTOR(_timestamp), 5)", "TUMBLE: SIZE is 5, must be an INTERVAL"),
        ("TUMBLE(TABLE t, DESCRIPTOR(_timestamp), INTERVAL '0' SECOND)", "must be an INTERVAL of a whole number"),
        ("TUMBLE(TABLE t, DESCRIPTOR(_timestamp), INTERVAL '-1' SECOND)", "must be an INTERVAL of a whole number"),
        ("TUMBLE(TABLE t, DESCRIPTOR(_timestamp), INTERVAL '1' MONTH)", "must be an INTERVAL of a whole number"),
        ("TUMBLE(TABLE t, DESCRIPTOR(_timestamp), INTERVAL '1.5' SECOND)", "must be an INTERVAL of a whole number"),
        ("TUMBLE(TABLE t, DESCRIPTOR(a, b), INTERVAL '1' SECOND)", "TUMBLE needs one time column"),
        ("TUMBLE(TABLE t PARTITION BY _key, DESCRIPTOR(_timestamp), INTERVAL '1' DAY)", "TUMBLE: PARTITION BY is not"),
        ("TUMBLE(TABLE t, DESCRIPTOR(_timestamp), SLIDE => INTERVAL '1' DAY)", "TUMBLE: SLIDE is no argument of it"),
        ("TUMBLE(TABLE t, DATA => TABLE t, SIZE => INTERVAL '1' DAY)", "TUMBLE: DATA is given twice"),
        ("HOP(TABLE t, DESCRIPTOR(_timestamp), INTERVAL '7' SECOND, INTERVAL '9' SECOND)", "be a multiple of SLIDE"),
        ("HOP(TABLE t, DESCRIPTOR(_timestamp), INTERVAL '1' DAY, INTERVAL '1' SECOND)", "must be a multiple of SLIDE"),
        ("CUMULATE(TABLE t, DESCRIPTOR(_timestamp), INTERVAL '7' SECOND, INTERVAL '10' SECOND)", "a multiple of STEP"),
        ("HOP(TABLE t, DESCRIPTOR(_timestamp), INTERVAL '1' SECOND, INTERVAL '10' DAY)",
         f"a row would be in 864000 windows, at most {WINDOWS_PER_ROW_MAX} are allowed"),
        ("TUMBLE(TABLE nope, DESCRIPTOR(_timestamp), INTERVAL '1' DAY)", "there is no table or topic 'nope'"),
        ("TUMBLE(TABLE read_csv('x'), DESCRIPTOR(_timestamp), INTERVAL '1' DAY)", "read_csv is not supported"),
        ("TUMBLE(TABLE t, DESCRIPTOR(_timestamp), INTERVAL '1' DAY", "TUMBLE( is not closed"),
    ],
)  # fmt: skip
def test_a_call_that_is_wrong_says_what(call: str, said: str) -> None:
    with pytest.raises(InvalidStatement) as error:
        query = parse(f"SELECT count(*) FROM {call}")
        assert isinstance(query, Query)
        bind(query, ["t"], {})
    assert said in str(error.value)


def test_a_place_behind_a_call_is_that_of_the_text() -> None:
    call = "TUMBLE(TABLE t, DESCRIPTOR(_timestamp), INTERVAL '1' DAY)"
    with pytest.raises(InvalidStatement) as error:
        query = parse(f"SELECT 1\nFROM {call}, nope")
        assert isinstance(query, Query)
        bind(query, ["t"], {})
    column = len(f"FROM {call}, ") + 1
    assert str(error.value).startswith(f"line 2, column {column}: ")


def test_a_row_without_a_time_is_in_no_window(engine: Duck) -> None:
    table = "(SELECT nullif(_timestamp, TIMESTAMPTZ '1970-01-01') AS time FROM t)"
    call = f"TUMBLE(TABLE {table}, DESCRIPTOR(time), INTERVAL '1' DAY)"
    assert run(engine, f"SELECT count(*) FROM {call}", [0, 1, 2]) == [(2,)]


def test_a_topic_may_have_the_name_of_a_function() -> None:
    query = parse('SELECT hop._key FROM "hop", tumble')
    assert isinstance(query, Query)
    assert [scan.topic for scan in bind(query, ["hop", "tumble"], {}).scans] == ["hop", "tumble"]
