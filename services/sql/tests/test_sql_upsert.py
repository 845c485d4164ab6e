"""Tables with a primary key: the newest row of each key, and none for a key whose newest record is a tombstone."""

import json
import random
from typing import Any

import pytest
from shproto.errors import InvalidStatement, StatementFailed
from streamhouse_sql.core.statement import parse

from services.sql.tests.declared import definition, rows_of
from services.sql.tests.start_sql import Sql, StartSql
from tests.platform.read_world import World

pytestmark = pytest.mark.timeout(120)

BY_KEY = "CREATE TABLE x (k VARCHAR METADATA FROM 'key', v INTEGER, PRIMARY KEY (k) NOT ENFORCED) WITH (topic = 't'{})"
BY_FIELDS = "CREATE TABLE x (a INTEGER, b VARCHAR, v INTEGER, PRIMARY KEY (b, a) NOT ENFORCED) WITH (topic = 't'{})"
SKIP = ", bad_rows = 'skip'"


def bodies(*values: Any) -> list[bytes | None]:
    return [None if value is None else json.dumps(value).encode() for value in values]


def test_a_definition_with_a_key_is_read_again_from_its_text() -> None:
    first = definition(BY_FIELDS.format(""))
    assert first.primary_key == ("b", "a")
    assert definition(first.text) == first


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("PRIMARY KEY (a)", "PRIMARY KEY must be NOT ENFORCED"),
        ("PRIMARY KEY (a) ENFORCED", ""),
        ("PRIMARY KEY (nope) NOT ENFORCED", "PRIMARY KEY: there is no column 'nope'"),
        ("PRIMARY KEY (a, a) NOT ENFORCED", "column a is given twice"),
        ("PRIMARY KEY (c) NOT ENFORCED", "column c must be a field of the value or METADATA FROM 'key'"),
        ("PRIMARY KEY (o) NOT ENFORCED", "column o must be a field"),
        ("PRIMARY KEY (a) NOT ENFORCED, PRIMARY KEY (a) NOT ENFORCED", "PRIMARY KEY is given twice"),
        ("PRIMARY KEY () NOT ENFORCED", ""),
    ],
)
def test_a_key_that_does_not_fit_is_refused(key: str, said: str) -> None:
    with pytest.raises(InvalidStatement) as error:
        parse(f"CREATE TABLE x (a INTEGER, c AS a + 1, o BIGINT METADATA FROM 'offset', {key}) WITH (topic = 't')")
    assert said in str(error.value)


def test_the_newest_row_of_each_key_is_there() -> None:
    x = definition(BY_KEY.format(""))
    values = bodies({"v": 1}, {"v": 2}, {"v": 3}, None, {"v": 5})
    keys = [b"a", b"b", b"a", b"b", b"c"]
    assert rows_of(x, values, keys=keys) == [(2, "a", 3), (4, "c", 5)]
    again = rows_of(x, [*values, *bodies({"v": 6})], keys=[*keys, b"b"])
    assert again == [(2, "a", 3), (4, "c", 5), (5, "b", 6)], "a key may come back"
    everything = rows_of(x, values, keys=keys, is_upsert=False)
    assert everything == [(0, "a", 1), (1, "b", 2), (2, "a", 3), (3, "b", None), (4, "c", 5)]


def test_newest_is_by_partition_then_offset() -> None:
    x = definition(BY_KEY.format(""))
    assert rows_of(x, bodies({"v": 1}, {"v": 2}), keys=[b"a", b"a"], partitions=[1, 0]) == [(0, "a", 1)]


def test_lines_of_a_record_are_in_their_order() -> None:
    x = definition(
        "CREATE TABLE x (a INTEGER, v VARCHAR, PRIMARY KEY (a) NOT ENFORCED) WITH (topic = 't', format = 'csv')"
    )
    assert rows_of(x, [b"1,a\n2,b\n1,c", b"2,d"]) == [(0, 1, "c"), (1, 2, "d")]


def test_a_row_without_its_key_is_bad() -> None:
    """A tombstone, too: it would delete a row, and does not say which."""
    values = bodies({"a": 1, "b": "x", "v": 1}, {"a": 1, "v": 2}, None, {"a": None, "b": "x"}, {"a": 2, "b": "x"})
    assert rows_of(definition(BY_FIELDS.format(SKIP)), values) == [(0, 1, "x", 1), (4, 2, "x", None)]
    for bad in (values[1:2], values[2:3], values[3:4]):
        with pytest.raises(StatementFailed, match="t/0: the value at offset 0 does not fit the columns of table x"):
            rows_of(definition(BY_FIELDS.format("")), bad)
    with pytest.raises(StatementFailed, match="t/0: the value at offset 0"):
        rows_of(definition(BY_KEY.format("")), bodies({"v": 1}))


def test_a_bad_row_does_not_hide_an_older_one() -> None:
    values = [*bodies({"v": 1}), b"no JSON", b"\xff"]
    assert rows_of(definition(BY_KEY.format(SKIP)), values, keys=[b"a"] * 3) == [(0, "a", 1)]


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_those_of_a_dictionary(seed: int) -> None:
    rng = random.Random(seed)
    count = 3_000
    values = bodies(*(rng.choice([None, {"v": i}, {"v": i}, {"v": "bad"}, {}]) for i in range(count)))
    keys = [rng.choice([None, *(b"%d" % rng.randrange(200) for _ in range(20))]) for _ in range(count)]
    partitions = [rng.randrange(3) for _ in range(count)]
    newest: dict[bytes, tuple[int, str, int | None] | None] = {}
    for offset in sorted(range(count), key=lambda i: (partitions[i], i)):
        key, value = keys[offset], values[offset]
        if key is None or value == b'{"v": "bad"}':
            continue
        row = None if value is None else (offset, key.decode(), json.loads(value).get("v"))
        newest[key] = row
    expected = sorted(row for row in newest.values() if row is not None)
    found = rows_of(definition(BY_KEY.format(SKIP)), values, keys=keys, partitions=partitions, threads=2)
    assert found == expected


async def with_prices(platform: World, start_sql: StartSql) -> Sql:
    await platform.create_topic("t")
    await platform.start_agent("a")
    await platform.grant("a", "t")
    await platform.produce(bodies(*({"k": i % 3, "v": i} for i in range(9))), "t")
    return await start_sql()


async def test_a_predicate_on_the_record_hides_no_newer_row(platform: World, start_sql: StartSql) -> None:
    """Nothing is pushed down: with `_offset < 5` the scan would end before the newest rows."""
    sql = await with_prices(platform, start_sql)
    await sql.run("CREATE TABLE x (k INTEGER, v INTEGER, PRIMARY KEY (k) NOT ENFORCED) WITH (topic = 't')")
    assert (await sql.run("SELECT * FROM x ORDER BY k")).rows == [(0, 6), (1, 7), (2, 8)]
    assert (await sql.run("SELECT count(*) FROM x WHERE _offset < 7")).value == 1
    assert (await sql.run("SELECT count(*) FROM x")).value == 3
    assert (await sql.run("SELECT v FROM x WHERE k = 1")).value == 7
    assert (await sql.run("DESCRIBE x")).rows[0] == ("k", "INTEGER", "PRIMARY KEY")


async def test_bytes_that_are_no_text_are_left_out_with_their_row(platform: World, start_sql: StartSql) -> None:
    await platform.create_topic("t")
    await platform.start_agent("a")
    await platform.grant("a", "t")
    await platform.produce([b'{"a": 1}', b'{"a": "\xff"}', b'{"a": 3}'], "t")
    sql = await start_sql()
    for format_, first in (("json", 1), ("text", '{"a": 1}'), ("csv", '{"a": 1}')):
        column = "a INTEGER" if format_ == "json" else "a VARCHAR"
        options = f"topic = 't', format = '{format_}'" + (", quote = ''" if format_ == "csv" else "")
        await sql.run(f"CREATE TABLE s_{format_} ({column}) WITH ({options}, bad_rows = 'skip')")
        rows = (await sql.run(f"SELECT a, _value FROM s_{format_} ORDER BY _offset")).rows
        assert [row[0] for row in rows][:1] == [first] and len(rows) == 2, format_
        assert rows[1][1] == '{"a": 3}'
        await sql.run(f"CREATE TABLE f_{format_} ({column}) WITH ({options})")
        with pytest.raises(StatementFailed, match="offset 1 is not UTF-8"):
            await sql.run(f"SELECT a FROM f_{format_}")
