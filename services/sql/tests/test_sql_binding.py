"""Names to topics, pruned columns, and predicates that are pushed down: those that may be, and no others."""

import pytest
from shproto.errors import InvalidStatement
from streamhouse_sql.core.binding import BoundQuery, Pushdown, TopicScan, bind
from streamhouse_sql.core.columns import COLUMN_NAMES
from streamhouse_sql.core.statement import Query, parse

pytestmark = pytest.mark.quick

TOPICS = ["t", "u", "Orders", "a.b", "with-dash", "MiXed", "mixed"]


def bound(text: str, *, all_columns: bool = False) -> BoundQuery:
    query = parse(text)
    assert isinstance(query, Query)
    return bind(query, TOPICS, {}, all_columns=all_columns)


def scan_of(text: str, topic: str = "t") -> TopicScan:
    (found,) = (scan for scan in bound(text).scans if scan.topic == topic)
    return found


def pushed(text: str, topic: str = "t") -> Pushdown:
    return scan_of(text, topic).pushdown


def where(condition: str) -> Pushdown:
    return pushed(f"SELECT _key FROM t WHERE {condition}")


def refused(text: str) -> InvalidStatement:
    with pytest.raises(InvalidStatement) as error:
        bound(text)
    return error.value


# ---- names


@pytest.mark.parametrize(
    ("name", "topic"),
    [
        ("t", "t"),
        ("T", "t"),
        ('"t"', "t"),
        ("orders", "Orders"),
        ("ORDERS", "Orders"),
        ('"Orders"', "Orders"),
        ('"a.b"', "a.b"),
        ('"with-dash"', "with-dash"),
        ("public.t", "t"),
        ("PUBLIC.t", "t"),
        ("mixed", "mixed"),
        ("MiXed", "MiXed"),
    ],
)
def test_a_name_finds_its_topic(name: str, topic: str) -> None:
    assert scan_of(f"SELECT _key FROM {name}", topic).topic == topic


def test_a_replaced_name_keeps_its_own_for_the_columns() -> None:
    assert bound('SELECT "a.b"._key FROM "a.b"').sql == 'SELECT "a.b"._key FROM scan_0 AS "a.b"'
    assert bound("SELECT x._key FROM t AS x").sql == "SELECT x._key FROM scan_0 AS x"
    assert bound("SELECT x._key FROM public . t x -- of x\n;").sql == "SELECT x._key FROM scan_0 x -- of x\n;"
    assert bound("SELECT 'äöü€😀' FROM T").sql == "SELECT 'äöü€😀' FROM scan_0 AS \"T\""
    assert bound("SELECT 't' FROM t, t AS t2").sql == "SELECT 't' FROM scan_0 AS \"t\", scan_1 AS t2"


@pytest.mark.parametrize(
    ("text", "said", "line", "column"),
    [
        ("SELECT * FROM tt", "there is no table or topic 'tt'; did you mean 't'?", 1, 15),
        (
            "SELECT *\nFROM t\nJOIN order USING (_key)",
            "there is no table or topic 'order'; did you mean 'Orders'?",
            3,
            6,
        ),
        ('SELECT * FROM "ORDERS"', "there is no table or topic 'ORDERS'; did you mean 'Orders'?", 1, 15),
        ("SELECT * FROM quite_another", "there is no table or topic 'quite_another'", 1, 15),
        ("SELECT * FROM 'file.csv'", "there is no table or topic 'file.csv'", 1, 15),
        ("SELECT * FROM MIXED", "there is no table or topic 'MIXED'; did you mean", 1, 15),
        (
            "SELECT * FROM a.b",
            "there is no schema 'a'; a topic with dots in its name is quoted: \"a.b\"",
            1,
            17,
        ),
        ("SELECT * FROM information_schema.tables", "there is no schema 'information_schema'", 1, 34),
        ("SELECT (SELECT max(_offset) FROM nope)", "there is no table or topic 'nope'", 1, 34),
    ],
)
def test_a_name_that_is_no_topic_is_an_error_with_its_place(text: str, said: str, line: int, column: int) -> None:
    error = refused(text)
    assert str(error).startswith(f"line {line}, column {column}: {said}")
    assert (error.details["line"], error.details["column"]) == (str(line), str(column))


@pytest.mark.parametrize(
    "name",
    ["read_csv('x')", "read_text('x')", "glob('*')", "duckdb_settings()", "pragma_version()", "query('SELECT 1')",
     "query_table(['t'])", "sniff_csv('x')", "parquet_scan('x')", '"read_csv"(\'x\')', "seq_scan('t')", "checkpoint()"],
)  # fmt: skip
def test_functions_of_duckdb_that_read_something_are_no_tables(name: str) -> None:
    function = name.partition("(")[0].strip('"')
    assert f"the table function {function} is not supported" in str(refused(f"SELECT * FROM {name}"))
    assert "is not supported" in str(refused(f"SELECT (SELECT count(*) FROM {name}) FROM t"))


@pytest.mark.parametrize(
    "text",
    [
        "SELECT * FROM range(3)",
        "SELECT * FROM generate_series(1, 3) AS s(i)",
        "SELECT * FROM unnest([1, 2]) AS u(x)",
        "SELECT x FROM t, unnest(_headers) AS u(x)",
        "SELECT key FROM t, json_each(_value)",
        "SELECT * FROM (VALUES (1)) AS v(a)",
    ],
)
def test_functions_of_their_arguments_are_tables(text: str) -> None:
    assert len(bound(text).scans) <= 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("SELECT * FROM (DESCRIBE t)", "cannot be read in this place"),
        ("SELECT * FROM (SUMMARIZE t)", "cannot be read in this place"),
        ("SELECT * FROM t PIVOT (count(*) FOR _key IN ('a'))", "PIVOT is not supported"),
        ("SELECT * FROM t UNPIVOT (v FOR k IN (_key))", "PIVOT is not supported"),
        ("TABLE t", "TABLE t is not supported: SELECT * FROM t is"),
    ],
)
def test_other_places_of_a_name_are_refused(text: str, said: str) -> None:
    assert said in str(refused(text))


@pytest.mark.parametrize(
    "text",
    [
        "SELECT * FROM ((VALUES (1)) vJOINx)",
        "WITH RECURSIVE r(n) AS (1 UNION ALL SELECT n + 1 FROM r WHERE n < 5) SELECT * FROM r",
        "SELECT {: 1} a, MAP {'a': 1}['a']",
        "WITH RECURSIVE r(n) AS (SELECTSELECT u UNION ALL SELECT n + 1 FROM r) SELECT * FROM r",
    ],
)
def test_a_text_that_the_parser_is_not_prepared_for_is_an_error_of_the_statement(text: str) -> None:
    """Found by random edits of statements; each was an error of the service."""
    try:
        bound(text)
    except InvalidStatement as error:
        assert "syntax" in str(error) or "cannot be read" in str(error)


# ---- common table expressions


@pytest.mark.parametrize(
    "text",
    [
        "WITH t AS (SELECT 1 AS _key) SELECT _key FROM t",
        "WITH T AS (SELECT 1 AS _key) SELECT _key FROM t",
        "WITH t AS (SELECT 1 AS _key) SELECT _key FROM T",
        "WITH t AS (SELECT 1 AS _key), x AS (SELECT * FROM T) SELECT _key FROM X",
        "WITH t AS (SELECT 1 AS _key) SELECT (SELECT max(_key) FROM T)",
        "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM T WHERE n < 5) SELECT * FROM t",
        "WITH t AS MATERIALIZED (SELECT 1 AS _key) SELECT * FROM t AS a JOIN T AS b USING (_key)",
    ],
)
def test_a_common_table_expression_hides_a_topic_in_any_case_of_letters(text: str) -> None:
    assert bound(text) == BoundQuery(sql=text, scans=())


def test_a_common_table_expression_reads_the_topic_that_it_hides() -> None:
    found = bound("WITH t AS (SELECT _key FROM t WHERE _offset > 3) SELECT _key FROM t WHERE _key < '9'")
    assert [scan.pushdown for scan in found.scans] == [Pushdown(offset_min=4)]
    assert found.sql.endswith("FROM scan_0 AS \"t\" WHERE _offset > 3) SELECT _key FROM t WHERE _key < '9'")


def test_a_schema_names_the_topic_also_where_its_name_is_hidden() -> None:
    assert scan_of("WITH t AS (SELECT 1 AS _key) SELECT _key FROM public.t").topic == "t"


def test_a_common_table_expression_cannot_have_the_name_of_a_scan() -> None:
    found = bound("WITH scan_0 AS (SELECT 1 AS _key) SELECT t._key FROM t, SCAN_0")
    assert found.scans[0].name not in ("scan_0", "SCAN_0") and found.scans[0].name in found.sql


# ---- columns


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("SELECT count(*) FROM t", ()),
        ("SELECT 1 FROM t", ()),
        ("SELECT _key FROM t", ("_key",)),
        ("SELECT _KEY FROM t", ("_key",)),
        ('SELECT "_Key" FROM t', ("_key",)),
        ("SELECT x._value FROM t AS x ORDER BY x._offset", ("_value", "_offset")),
        ("SELECT count(*) FROM t WHERE _value ->> '$._key' = 'a'", ("_value",)),
        ("SELECT sum(_offset) FROM t GROUP BY _partition HAVING max(_timestamp) > now()",
         ("_partition", "_offset", "_timestamp")),
        ("SELECT max(_offset) OVER w FROM t WINDOW w AS (PARTITION BY _key)", ("_key", "_offset")),
        ("SELECT t._offset FROM t JOIN (SELECT 1 AS _key) AS s USING (_key)", ("_key", "_offset")),
        ("SELECT h.name FROM t, unnest(_headers) AS u(h)", ("_headers",)),
        ("SELECT (SELECT max(t._offset)) FROM t", ("_offset",)),
        ("SELECT * FROM t", COLUMN_NAMES),
        ("FROM t", COLUMN_NAMES),
        ("SELECT t.* FROM t", COLUMN_NAMES),
        ("SELECT * EXCLUDE (_key) FROM t", COLUMN_NAMES),
        ("SELECT COLUMNS('_k.*') FROM t", COLUMN_NAMES),
        ("SELECT min(COLUMNS(*)) FROM t", COLUMN_NAMES),
        ("SELECT COLUMNS(lambda c: c = '_key') FROM t", COLUMN_NAMES),
        ("SELECT struct_pack(*COLUMNS(*)) FROM t", COLUMN_NAMES),
        ("SELECT t FROM t", COLUMN_NAMES),
        ("SELECT x FROM t AS x", COLUMN_NAMES),
        ("SELECT to_json(T) FROM t", COLUMN_NAMES),
        ("SELECT count(DISTINCT *) FROM t", COLUMN_NAMES),
        ("SELECT count(*) FROM t NATURAL JOIN (SELECT 1 AS _partition)", COLUMN_NAMES),
        ("SELECT a FROM t AS x(a, b)", COLUMN_NAMES),
        ("SELECT count(*) FROM (SELECT * FROM t)", COLUMN_NAMES),
    ],
)  # fmt: skip
def test_the_columns_that_a_query_needs_are_decoded(text: str, columns: tuple[str, ...]) -> None:
    assert scan_of(text).columns == columns


def test_all_columns_may_be_asked_for() -> None:
    assert bound("SELECT _key FROM t", all_columns=True).scans[0].columns == COLUMN_NAMES


# ---- predicates that are pushed down


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("_partition = 3", Pushdown(partitions=frozenset({3}))),
        ("3 = _partition", Pushdown(partitions=frozenset({3}))),
        ("_partition IN (1, 2)", Pushdown(partitions=frozenset({1, 2}))),
        ("_partition IN (1, 2) AND _partition IN (2, 3)", Pushdown(partitions=frozenset({2}))),
        ("_partition = 1 AND _partition = 2", Pushdown(partitions=frozenset())),
        ("_offset = 7", Pushdown(offset_min=7, offset_max=8)),
        ("_offset > 7", Pushdown(offset_min=8)),
        ("_offset >= 7", Pushdown(offset_min=7)),
        ("_offset < 7", Pushdown(offset_max=7)),
        ("_offset <= 7", Pushdown(offset_max=8)),
        ("7 < _offset", Pushdown(offset_min=8)),
        ("7 >= _offset", Pushdown(offset_max=8)),
        ("_offset BETWEEN 3 AND 5", Pushdown(offset_min=3, offset_max=6)),
        ("_offset IN [3]", Pushdown(offset_min=3, offset_max=4)),
        ("_offset IN (9, 5)", Pushdown(offset_min=5, offset_max=10)),
        ("_offset > -1", Pushdown(offset_min=0)),
        ("_offset > 3 AND _offset > 5 AND _offset < 9 AND _offset < 20", Pushdown(offset_min=6, offset_max=9)),
        ("(_offset > 3 AND (_partition = 1)) AND _key = 'a'", Pushdown(partitions=frozenset({1}), offset_min=4)),
        ("t._offset > 3 AND T.\"_OFFSET\" < 9", Pushdown(offset_min=4, offset_max=9)),
        ("_timestamp > '2026-01-01'", Pushdown(timestamps_min=("'2026-01-01'",))),
        ("'2026-01-01' <= _timestamp", Pushdown(timestamps_min=("'2026-01-01'",))),
        ("_timestamp = TIMESTAMP '2026-01-01'", Pushdown(timestamps_min=("CAST('2026-01-01' AS TIMESTAMP)",))),
        ("_timestamp BETWEEN '2026-01-01' AND '2026-02-01'", Pushdown(timestamps_min=("'2026-01-01'",))),
        ("_timestamp > now() - INTERVAL '1' HOUR", Pushdown(timestamps_min=("NOW() - INTERVAL '1' HOUR",))),
        ("_timestamp > DATE '2026-01-01' + INTERVAL 1 DAY",
         Pushdown(timestamps_min=("CAST('2026-01-01' AS DATE) + INTERVAL '1' DAY",))),
        ("_timestamp > current_date", Pushdown(timestamps_min=("CURRENT_DATE",))),
    ],
)  # fmt: skip
def test_a_predicate_on_the_place_of_a_record_is_pushed_down(condition: str, expected: Pushdown) -> None:
    assert where(condition) == expected


@pytest.mark.parametrize(
    "condition",
    [
        "_partition = 1 OR _offset = 3",
        "_offset > 3 OR true",
        "NOT _offset > 3",
        "NOT (_offset > 3 AND _partition = 1)",
        "_partition <> 1",
        "_partition > 1",
        "_partition NOT IN (1, 2)",
        "_offset NOT BETWEEN 3 AND 5",
        "_offset BETWEEN SYMMETRIC 5 AND 3",
        "_offset IN (1, NULL)",
        "_offset IN (SELECT 3)",
        "_offset = 3.5",
        "_offset = '3'",
        "_offset > 2 + 1",
        "_offset + 1 > 3",
        "_offset > _partition",
        "_offset > (SELECT 3)",
        "_offset IS NOT DISTINCT FROM 3",
        "(_offset > 3) = false",
        "CASE WHEN _offset > 3 THEN true END",
        "_timestamp < '2026-01-01'",
        "_timestamp <> '2026-01-01'",
        "_timestamp > _value::TIMESTAMP",
        "_timestamp > (SELECT TIMESTAMP '2026-01-01')",
        "_timestamp > to_timestamp(0) + INTERVAL (random()) DAY",
        "_timestamp > TIMESTAMP '2026-01-01' AT TIME ZONE 'Europe/Berlin'",
        # The bound is lower once the query runs.
        "_timestamp > TIMESTAMP '2030-01-01' - (now() - TIMESTAMP '2026-01-01')",
        "_timestamp > TIMESTAMP '2030-01-01' + -(now() - TIMESTAMP '2026-01-01')",
        "_value ->> '$._offset' > 3",
        "x._offset > 3",
    ],
)
def test_a_predicate_that_says_less_is_not_pushed_down(condition: str) -> None:
    assert where(condition) == Pushdown()


def test_a_long_chain_of_predicates_is_read_whole() -> None:
    condition = " AND ".join(f"_offset <> {number}" for number in range(3_000))
    assert where(f"{condition} AND _offset > 3") == Pushdown(offset_min=4)


@pytest.mark.parametrize(
    "text",
    [
        "SELECT 1 FROM t AS x(_offset, b) WHERE _offset > 3",
        "SELECT 1 FROM t TABLESAMPLE 10% WHERE _offset > 3",
        "SELECT 1 FROM t WHERE _offset > 3 USING SAMPLE 10",
        "SELECT 1 FROM t ASOF JOIN u ON t._key = u._key AND t._timestamp >= u._timestamp WHERE t._offset > 3",
        "SELECT 1 FROM u ASOF JOIN t ON t._key = u._key AND t._timestamp >= u._timestamp WHERE t._offset > 3",
        "SELECT 1 FROM u ASOF LEFT JOIN t USING (_key, _timestamp) WHERE t._offset > 3",
        "SELECT 1 FROM t POSITIONAL JOIN u WHERE t._offset > 3",
        "SELECT 1 FROM u ANTI JOIN t ON t._key = u._key WHERE u._offset > 3",
        "SELECT 1 FROM t SEMI JOIN u ON t._key = u._key WHERE t._offset > 3",
        "SELECT 1 FROM t, u WHERE _offset > 3",
        "SELECT 1 FROM t JOIN u ON t._offset > 3",
        "SELECT 1 FROM t LEFT JOIN u ON t._offset > 3 WHERE u._offset IS NULL",
        "SELECT 1 FROM t HAVING max(_offset) > 3",
        "SELECT 1 FROM t QUALIFY _offset > 3",
        "SELECT count(*) FILTER (WHERE _offset > 3) FROM t",
        "SELECT _offset > 3 FROM t",
        "SELECT 1 FROM t WHERE EXISTS (SELECT 1 FROM u WHERE t._offset > 3)",
        "SELECT 1 FROM t AS x WHERE EXISTS (SELECT 1 FROM u AS x WHERE x._offset > 3)",
        "SELECT 1 FROM u WHERE u._offset IN (SELECT _offset FROM t)",
        "SELECT 1 FROM (SELECT _offset FROM t) AS x WHERE _offset > 3",
        "WITH c AS (SELECT _offset FROM t) SELECT 1 FROM c WHERE _offset > 3",
        "SELECT 1 FROM (VALUES (1)) AS v(a) LEFT JOIN LATERAL (SELECT _key FROM t LIMIT 1) AS l ON true WHERE a > 3",
    ],
)
def test_nothing_is_pushed_down_where_other_rows_would_change(text: str) -> None:
    assert pushed(text) == Pushdown()


@pytest.mark.parametrize(
    ("text", "topic", "expected"),
    [
        ("SELECT 1 FROM t JOIN u USING (_key) WHERE t._offset > 3", "t", Pushdown(offset_min=4)),
        ("SELECT 1 FROM t LEFT JOIN u USING (_key) WHERE u._offset > 3", "u", Pushdown(offset_min=4)),
        ("SELECT 1 FROM t FULL JOIN u USING (_key) WHERE t._offset > 3", "t", Pushdown(offset_min=4)),
        ("SELECT 1 FROM t CROSS JOIN u WHERE t._partition = 1", "t", Pushdown(partitions=frozenset({1}))),
        ("SELECT 1 FROM t, u WHERE u._partition = 1 AND t._offset < 3", "u", Pushdown(partitions=frozenset({1}))),
        ("SELECT 1 FROM t WHERE EXISTS (SELECT 1 FROM u WHERE _offset > 3)", "u", Pushdown(offset_min=4)),
        ("SELECT 1 FROM t AS x WHERE EXISTS (SELECT 1 FROM u AS x WHERE x._offset > 3)", "u", Pushdown(offset_min=4)),
        ("SELECT (SELECT max(_offset) FROM u WHERE _partition = 1) FROM t", "u", Pushdown(partitions=frozenset({1}))),
        ("SELECT 1 FROM (SELECT * FROM t WHERE _offset > 3)", "t", Pushdown(offset_min=4)),
        ("SELECT _offset + 1 AS _partition FROM t WHERE _partition = 3", "t", Pushdown(partitions=frozenset({3}))),
    ],
)
def test_a_predicate_of_a_join_or_a_subquery_is_pushed_into_its_own_table(
    text: str, topic: str, expected: Pushdown
) -> None:
    assert pushed(text, topic) == expected


def test_each_side_of_a_union_has_its_own_predicates() -> None:
    found = bound("SELECT _key FROM t WHERE _offset < 3 UNION ALL SELECT _key FROM t WHERE _offset > 7")
    assert [scan.pushdown for scan in found.scans] == [Pushdown(offset_max=3), Pushdown(offset_min=8)]


@pytest.mark.parametrize(
    "text",
    ["SELECT * FROM " + "(SELECT * FROM " * 150 + "t" + ")" * 150, "SELECT 1" + " UNION ALL SELECT 1" * 2_000],
    ids=["subqueries", "unions"],
)
def test_what_is_nested_too_deeply_to_be_bound_is_an_error_of_the_statement(text: str) -> None:
    try:
        assert len(bound(text).scans) <= 1
    except InvalidStatement as error:
        assert "nested too deeply" in str(error)
