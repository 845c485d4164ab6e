"""Statements that run, statements that are refused with the name of what is refused, and places in errors."""

import pytest
from shproto.errors import InvalidStatement
from streamhouse_sql.core.statement import Describe, Explain, Query, ShowTables, parse

pytestmark = pytest.mark.quick

REFUSED = {
    "INSERT INTO t SELECT 1": "INSERT",
    "UPDATE t SET a = 1": "UPDATE",
    "DELETE FROM t": "DELETE",
    "MERGE INTO t USING u ON t.a = u.a WHEN MATCHED THEN DELETE": "MERGE",
    "TRUNCATE TABLE t": "TRUNCATE",
    "CREATE VIEW v AS SELECT 1": "CREATE",
    "CREATE TABLE t AS SELECT 1": "CREATE",
    "CREATE MACRO f(x) AS x + 1": "CREATE",
    "COPY t TO 'file'": "COPY",
    "COPY (SELECT 1) TO 'file'": "COPY",
    "ATTACH 'file' AS x": "ATTACH",
    "DETACH x": "DETACH",
    "USE x": "USE",
    "PRAGMA database_list": "PRAGMA",
    "SET threads = 3": "SET",
    "RESET threads": "RESET",
    "INSTALL httpfs": "INSTALL",
    "LOAD httpfs": "LOAD",
    "CALL pragma_version()": "CALL",
    "IMPORT DATABASE 'x'": "IMPORT",
    "CHECKPOINT": "CHECKPOINT",
    "VACUUM": "VACUUM",
    "ANALYZE t": "ANALYZE",
    "BEGIN": "BEGIN",
    "COMMIT": "COMMIT",
    "ROLLBACK": "ROLLBACK",
    "PREPARE p AS SELECT 1": "PREPARE",
    "EXECUTE p": "EXECUTE",
    "SUMMARIZE t": "SUMMARIZE",
    "PIVOT t ON a USING count(*)": "PIVOT",
    "UNPIVOT t ON a": "UNPIVOT",
    "EXPLAIN INSERT INTO t SELECT 1": "INSERT",
    "EXPLAIN EXPLAIN SELECT 1": "EXPLAIN",
    "SELCT 1": "SELCT",
    "-- a\nMATCH (1": "MATCH",
}


@pytest.mark.parametrize(("text", "name"), REFUSED.items())
def test_a_statement_that_is_not_supported_is_refused_by_its_name(text: str, name: str) -> None:
    with pytest.raises(InvalidStatement, match="is not supported") as refused:
        parse(text)
    assert refused.value.details["clause"].startswith(name), refused.value


@pytest.mark.parametrize(
    ("text", "said"),
    {
        "SELECT * INTO x FROM t": "SELECT INTO is not supported",
        "SELECT * FROM t FOR UPDATE": "FOR UPDATE and FOR SHARE are not supported: records never change",
        "SELECT * FROM t WHERE _offset = $1": "is a parameter, and there is no value for it here",
        "SELECT * FROM t WHERE _offset = ?": "is a parameter, and there is no value for it here",
        "SELECT * FROM t WHERE _offset = :first": "is a parameter, and there is no value for it here",
        "WITH x AS (INSERT INTO t VALUES (1) RETURNING *) SELECT * FROM x": "INSERT is not supported inside a query",
        "SHOW VIEWS": "SHOW VIEWS is not supported; SHOW TABLES is",
        "EXPLAIN ANALYZE SELECT 1": "EXPLAIN ANALYZE is not supported; EXPLAIN is",
        "explain /* all */ analyze SELECT 1": "EXPLAIN ANALYZE is not supported; EXPLAIN is",
        "SELECT 1; SELECT 2": "there are 2 statements; run them one by one",
        "": "the statement is empty",
        " \n-- nothing\n;": "the statement is empty",
        "DESCRIBE read_csv('x')": "DESCRIBE takes the name of a topic, or a SELECT",
    }.items(),
)
def test_a_clause_that_is_not_supported_is_refused_in_words(text: str, said: str) -> None:
    with pytest.raises(InvalidStatement) as refused:
        parse(text)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("text", "line", "column", "token"),
    [
        ("SELECT * FRM t", 1, 14, "'t'"),
        ("SELECT *\nFROM t\n  WHERE WHERE", 3, 9, "'WHERE'"),
        ("SELECT (1", 1, 9, "'1'"),
        ("EXPLAIN\nSELECT 1 +", 2, 10, "'+'"),
        ("  SELECT 1 FROM t GROUP 1", 1, 25, "'1'"),
    ],
)
def test_an_error_of_syntax_has_its_place(text: str, line: int, column: int, token: str) -> None:
    with pytest.raises(InvalidStatement, match=f"^line {line}, column {column}: ") as refused:
        parse(text)
    assert token in str(refused.value)
    assert refused.value.details == {"line": str(line), "column": str(column)}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("SELECT 'abc", "line 1: a text or name has no end: ' is missing"),
        ('SELECT\n  "abc', 'line 2: a text or name has no end: " is missing'),
        ("SELECT $$abc", "line 1: a text or name has no end: $$ is missing"),
        ("SELECT /* abc", "the statement has a comment or a text without its end"),
    ],
)
def test_a_text_without_its_end_is_an_error(text: str, said: str) -> None:
    with pytest.raises(InvalidStatement) as refused:
        parse(text)
    assert str(refused.value) == said


@pytest.mark.parametrize(
    "text",
    [
        "SELECT " + "(" * 5_000 + "1" + ")" * 5_000,
        "SELECT " + "NOT " * 5_000 + "true",
        "SELECT " + "[" * 5_000 + "]" * 5_000,
        "SELECT * FROM " + "(SELECT * FROM " * 2_000 + "t" + ")" * 2_000,
    ],
    ids=["parentheses", "NOT", "lists", "subqueries"],
)
def test_deep_nesting_is_an_error_of_the_statement(text: str) -> None:
    with pytest.raises(InvalidStatement, match="nested too deeply"):
        parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "SELECT 1",
        "select 1;",
        "SELECT 1; -- done",
        "FROM t",
        "FROM t SELECT _key",
        "VALUES (1), (2)",
        "(SELECT 1) UNION ALL (SELECT 2)",
        "WITH a AS (SELECT 1) SELECT * FROM a",
        "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r WHERE n < 5) SELECT * FROM r",
        "SELECT * FROM t, unnest([1, 2]) AS u(x)",
        "SELECT if(true, 1, 2), bool_and(true), group_concat('a'), $$it's$$, approx_top_k(1, 1)",
        "SELECT 1 BETWEEN SYMMETRIC 3 AND 0",
        "SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY _offset) FROM t",
        "SELECT struct_pack(*COLUMNS(*)) FROM t",
        "SELECT * FROM t FETCH FIRST 1 ROW ONLY",
    ],
)
def test_a_query_keeps_its_text(text: str) -> None:
    query = parse(text)
    assert isinstance(query, Query) and query.text == text


def test_statements_about_topics() -> None:
    assert isinstance(parse("SHOW TABLES"), ShowTables)
    assert isinstance(parse(" show topics ; "), ShowTables)
    assert parse('DESCRIBE "a.b"') == Describe("a.b")
    assert parse("desc orders") == Describe("orders")
    described = parse("DESCRIBE SELECT 1")
    assert isinstance(described, Describe) and described.query is not None
    assert described.query.text == "         SELECT 1", "places stay those of the whole text"
    explained = parse("EXPLAIN\nSELECT 1")
    assert isinstance(explained, Explain) and explained.query.text == "       \nSELECT 1"


@pytest.mark.parametrize("comment", ["/* a\n b */ ", "-- a\n", "\n /**/ -- b\n"])
@pytest.mark.parametrize(
    ("text", "kind"),
    [("SHOW TABLES", ShowTables), ("EXPLAIN SELECT 1", Explain), ("DESCRIBE SELECT 1", Describe), ("FROM t", Query)],
)
def test_a_comment_may_come_first(comment: str, text: str, kind: type) -> None:
    assert isinstance(parse(comment + text), kind)
