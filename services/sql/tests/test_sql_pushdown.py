"""A query has the same result with its predicates pushed down as without: DuckDB computes both."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shformat import Records
from shproto.errors import StreamHouseError
from streamhouse_sql.adapters.duck import Duck, DuckLimits
from streamhouse_sql.arrow import schema_of, to_arrow
from streamhouse_sql.core.binding import Pushdown, bind
from streamhouse_sql.core.columns import COLUMN_NAMES
from streamhouse_sql.core.statement import Query, parse
from streamhouse_sql.snapshot import oldest_needed_ms

TOPICS = {"t": 3, "u": 2}
# 2026-01-01 and the seconds around it.
BASE_MS = 1_767_225_600_000
OFFSETS = st.integers(-2, 12)
PARTITIONS = st.integers(0, 3)
SECONDS = st.integers(-3, 12).map(lambda s: f"TIMESTAMPTZ '2026-01-01 00:00:00+00' + INTERVAL '{s}' SECOND")
COMPARE = st.sampled_from(["=", ">", ">=", "<", "<=", "<>"])

Log = dict[str, list[tuple[int, Records]]]


def predicates(table: str) -> st.SearchStrategy[str]:
    """Returns predicates over the columns of a table, of which many are pushed down and many must not be."""
    name = f"{table}." if table else ""
    places = st.one_of(
        st.builds("{}_offset {} {}".format, st.just(name), COMPARE, OFFSETS),
        st.builds("{2} {1} {0}_offset".format, st.just(name), COMPARE, OFFSETS),
        st.builds("{}_partition {} {}".format, st.just(name), COMPARE, PARTITIONS),
        st.builds("{}_offset BETWEEN {} AND {}".format, st.just(name), OFFSETS, OFFSETS),
        st.builds("{}_offset NOT BETWEEN {} AND {}".format, st.just(name), OFFSETS, OFFSETS),
        st.builds("{}_offset IN ({}, {})".format, st.just(name), OFFSETS, OFFSETS),
        st.builds("{}_partition IN ({}, {}, NULL)".format, st.just(name), PARTITIONS, PARTITIONS),
        st.builds("{}_partition NOT IN ({})".format, st.just(name), PARTITIONS),
        st.builds("{}_timestamp {} {}".format, st.just(name), COMPARE, SECONDS),
        st.builds("{1} {2} {0}_timestamp".format, st.just(name), SECONDS, COMPARE),
        st.builds("{}_timestamp BETWEEN {} AND {}".format, st.just(name), SECONDS, SECONDS),
        st.builds("{}_value = '{}'".format, st.just(name), st.sampled_from("ab")),
        st.builds("{}_key IS NULL".format, st.just(name)),
    )
    return st.recursive(
        places,
        lambda inner: st.one_of(
            st.builds("({} AND {})".format, inner, inner),
            st.builds("({} OR {})".format, inner, inner),
            st.builds("NOT ({})".format, inner),
        ),
        max_leaves=4,
    )


def conjunctions(*tables: str) -> st.SearchStrategy[str]:
    parts = st.lists(st.one_of(*(predicates(table) for table in tables)), min_size=1, max_size=4)
    return parts.map(" AND ".join)


JOINS = st.sampled_from(
    [
        "JOIN u USING (_key)",
        "LEFT JOIN u USING (_key)",
        "RIGHT JOIN u USING (_key)",
        "FULL JOIN u USING (_key)",
        "JOIN u ON t._offset = u._offset",
        "LEFT JOIN u ON t._key = u._key AND t._offset > 2",
        "CROSS JOIN u",
        "ASOF JOIN u ON t._key = u._key AND t._timestamp >= u._timestamp",
        "ASOF LEFT JOIN u ON t._key = u._key AND t._timestamp >= u._timestamp",
    ]
)
QUERIES = st.one_of(
    st.builds("SELECT * FROM t WHERE {}".format, conjunctions("", "t")),
    st.builds("SELECT x._key, count(*) FROM t AS x WHERE {} GROUP BY 1".format, conjunctions("", "x")),
    st.builds("SELECT t._offset, u._offset FROM t {} WHERE {}".format, JOINS, conjunctions("t", "u")),
    st.builds("SELECT t._offset FROM t SEMI JOIN u USING (_key) WHERE {}".format, conjunctions("t")),
    st.builds("SELECT t._offset FROM t ANTI JOIN u USING (_key) WHERE {}".format, conjunctions("t")),
    st.builds("SELECT _offset FROM t WHERE {} AND _key IN (SELECT _key FROM u WHERE {})".format,
              conjunctions(""), conjunctions("")),
    st.builds("SELECT _offset FROM t WHERE EXISTS (SELECT 1 FROM u AS t WHERE t._offset = 3 AND {}) AND {}".format,
              conjunctions("t"), conjunctions("t")),
    st.builds("SELECT _offset FROM t WHERE (SELECT max(u._offset) FROM u WHERE u._key = t._key AND {}) > 3 AND {}"
              .format, conjunctions("t", "u"), conjunctions("t")),
    st.builds("WITH t AS (SELECT * FROM t WHERE {}) SELECT _offset FROM t WHERE {}".format,
              conjunctions(""), conjunctions("")),
    st.builds("SELECT _offset FROM t WHERE {} UNION ALL SELECT _offset FROM u WHERE {}".format,
              conjunctions(""), conjunctions("")),
    st.builds("SELECT t._offset, l.x FROM t LEFT JOIN LATERAL (SELECT max(u._offset) AS x FROM u WHERE "
              "u._key = t._key AND {}) AS l ON true WHERE {}".format, conjunctions("u", "t"), conjunctions("t")),
    st.builds("SELECT a, c FROM t AS x(a, _offset, c) WHERE x._partition > 0 AND {}".format, predicates("")
              .filter(lambda text: "_offset" not in text)),
    st.builds("SELECT row_number() OVER (PARTITION BY _key ORDER BY _partition, _offset) FROM t WHERE {}".format,
              conjunctions("")),
)  # fmt: skip


@st.composite
def logs(draw: st.DrawFn) -> Log:
    """Draws some records in each partition, with timestamps that do not ascend."""
    found: Log = {}
    for topic, partitions in TOPICS.items():
        for partition in range(partitions):
            count = draw(st.integers(0, 10))
            keys = draw(st.lists(st.sampled_from([b"k", b"l", None]), min_size=count, max_size=count))
            values = draw(st.lists(st.sampled_from([b"a", b"b", None]), min_size=count, max_size=count))
            times = draw(st.lists(st.integers(-2_000, 11_000), min_size=count, max_size=count))
            records = Records.from_lists(values, keys=keys, timestamps_ms=[BASE_MS + ms for ms in times])
            found.setdefault(topic, []).append((partition, records))
    return found


def read(log: Log, topic: str, columns: tuple[str, ...], pushdown: Pushdown, oldest_ms: int | None) -> Any:
    """Returns the records that a scan with this push-down may leave, and no others."""
    batches = []
    for partition, records in log[topic]:
        kept = pushdown.partitions is None or partition in pushdown.partitions
        kept_rows = [
            i
            for i in range(len(records))
            if kept
            and (pushdown.offset_min is None or i >= pushdown.offset_min)
            and (pushdown.offset_max is None or i < pushdown.offset_max)
            and (oldest_ms is None or records.timestamps_ms[i] >= oldest_ms)
        ]
        batch = to_arrow(topic, partition, records, columns or ("_offset",))
        batches.append(batch.take(pa.array(kept_rows, pa.int64())))
    return pa.Table.from_batches(batches, schema_of(columns or ("_offset",)))


def result(log: Log, text: str, engine: Duck, *, push_down: bool) -> tuple[list[str], int]:
    """Returns the sorted rows of a query, or its error, and the number of records that were scanned."""
    query = parse(text)
    assert isinstance(query, Query)
    found = bind(query, TOPICS, {}, all_columns=not push_down)
    scanned = 0
    for scan in found.scans:
        pushdown = scan.pushdown if push_down else Pushdown()
        table = read(log, scan.topic, scan.columns, pushdown, oldest_needed_ms(pushdown, engine.timestamp_ms))
        scanned += len(table)
        engine.add_table(scan.name, table)
    try:
        _, batches = engine.result(found.sql, 1_000)
        return sorted(str(row) for batch in batches for row in zip(*batch.to_pydict().values(), strict=True)), scanned
    except StreamHouseError as error:
        return [type(error).__name__], scanned


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Duck]:
    directory: Path = tmp_path_factory.mktemp("spill")
    found = Duck(DuckLimits(memory_bytes_max=1 << 28, temp_dir=directory, temp_bytes_max=1 << 28, threads=1))
    yield found
    found.close()


@pytest.mark.long
@settings(max_examples=60, deadline=None)
@given(log=logs(), text=QUERIES)
def test_push_down_changes_no_result(engine: Duck, log: Log, text: str) -> None:
    pushed, _ = result(log, text, engine, push_down=True)
    whole, _ = result(log, text, engine, push_down=False)
    assert pushed == whole, text


def test_the_property_sees_a_push_down_that_leaves_out_too_much(engine: Duck) -> None:
    """And push-down leaves out something at all."""
    records = Records.from_lists([b"a"] * 10, keys=[b"k"] * 10, timestamps_ms=[BASE_MS + 1_000 * i for i in range(10)])
    log: Log = {"t": [(0, records), (1, records)], "u": [(0, records)]}
    text = "SELECT _offset FROM t WHERE _partition = 1 AND _offset > 3 AND _timestamp > '2026-01-01 00:00:06'"
    assert result(log, text, engine, push_down=True) == (["(7,)", "(8,)", "(9,)"], 4)
    assert result(log, text, engine, push_down=False) == (["(7,)", "(8,)", "(9,)"], 20)
    assert len(read(log, "t", COLUMN_NAMES, Pushdown(offset_min=5), None)) == 10
