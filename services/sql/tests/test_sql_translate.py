"""Statements for other engines: the text of each construct for each target, and refusals by name. translated/ has the
statements (NAME.sql), and for each target their text or the error (NAME.TARGET.sql)."""

from pathlib import Path

import pytest
from shproto.errors import InvalidStatement
from sqlglot import exp
from streamhouse_sql.core import translate as module
from streamhouse_sql.core.dialect import StreamHouse
from streamhouse_sql.core.statement import one_tree
from streamhouse_sql.core.translate import TARGETS, translate
from streamhouse_sql.core.windows import with_placeholders

HERE = Path(__file__).parent / "translated"
NAMES = sorted(path.name.removesuffix(".sql") for path in HERE.glob("*.sql") if path.name.count(".") == 1)
SCHEMA = '{"type": "record", "name": "R", "fields": [{"name": "a", "type": "int"}]}'
BID = "CREATE TABLE bid (auction BIGINT, price DOUBLE, channel VARCHAR, ts TIMESTAMP) WITH (topic = 'bid');\n"


def said(text: str, target: str) -> str:
    """Returns the statements for a target, or the error."""
    try:
        return "\n".join(str(statement) for statement in translate(text, target, servers="kafka:9092"))
    except InvalidStatement as error:
        return f"error: {error}\n"


def refused(text: str, target: str) -> str:
    with pytest.raises(InvalidStatement) as error:
        translate(text, target, servers="kafka:9092")
    return str(error.value)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NAMES)
def test_the_text_for_a_target(name: str, target: str) -> None:
    assert said((HERE / f"{name}.sql").read_text(), target) == (HERE / f"{name}.{target}.sql").read_text()


def test_there_are_texts_for_each_statement_and_no_other() -> None:
    assert len(NAMES) > 20
    assert sorted(path.name for path in HERE.iterdir()) == sorted(
        name for base in NAMES for name in (f"{base}.sql", *(f"{base}.{target}.sql" for target in TARGETS))
    )


def test_every_node_that_is_known_is_in_a_text() -> None:
    """A node is on the list of a target only if a text here shows how the target has it."""
    seen: dict[str, set[type[exp.Expr]]] = {target: set() for target in TARGETS}
    for name in NAMES:
        for statement in module._statements((HERE / f"{name}.sql").read_text()):
            at = statement.upper().find("SELECT")
            at = statement.upper().find("WITH ") if "WITH DEAR" in statement.upper() else at
            if at < 0:
                continue
            query = statement[at:].split("EMIT")[0]
            nodes = {type(node) for node in one_tree(with_placeholders(query)[0].text, StreamHouse).walk()}
            for target in TARGETS:
                if not (HERE / f"{name}.{target}.sql").read_text().startswith("error:"):
                    seen[target] |= nodes
    for kind, targets in module._KNOWN.items():
        for target in targets:
            assert kind in seen[target], (kind, target)


def test_the_page_shows_what_is_written() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "scale-out.md").read_text()
    given = page.partition("```sql\n")[2].partition("```")[0]
    shown = page.partition("`--to risingwave` gives:\n\n```\n")[2].partition("```")[0]
    found = translate(given, "risingwave", servers="localhost:9092")
    assert "\n".join(str(statement) for statement in found) == shown


# ---- refusals


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("query", "what"),
    [
        ("SELECT FOO(auction) FROM bid", "FOO(auction)"),
        ("SELECT FIRST(price) FROM bid", "FIRST(price)"),
        ("SELECT time_bucket(INTERVAL '1 minute', ts) FROM bid", "TIME_BUCKET(INTERVAL '1' MINUTE, ts)"),
        ("SELECT [1, 2] FROM bid", "[1, 2]"),
        ("SELECT {'a': price} FROM bid", "{'a': price}"),
        ("SELECT auction // 2 FROM bid", "auction // 2"),
        ("SELECT regexp_matches(channel, 'x') FROM bid", "REGEXP_MATCHES(channel, 'x')"),
        ("SELECT channel ILIKE 'a' FROM bid", "channel ILIKE 'a'"),
        ("SELECT price FROM bid GROUP BY ALL", "GROUP BY ALL"),
        ("SELECT price FROM bid GROUP BY ROLLUP (price)", "ROLLUP (price)"),
        ("SELECT DISTINCT ON (price) price FROM bid", "DISTINCT ON"),
        ("SELECT * EXCLUDE (price) FROM bid", "* EXCLUDE"),
        ("SELECT * FROM bid QUALIFY ROW_NUMBER() OVER (ORDER BY ts) = 1", "QUALIFY beside *"),
        ("SELECT price FROM bid LIMIT 5 OFFSET 3", "OFFSET 3"),
        ("SELECT price FROM bid UNION ALL BY NAME SELECT price FROM bid", "UNION BY NAME"),
        ("SELECT price FROM bid EXCEPT SELECT price FROM bid", "SELECT price FROM bid EXCEPT SELECT price FROM bid"),
        ("WITH RECURSIVE x AS (SELECT 1 AS a) SELECT a FROM x", "WITH RECURSIVE"),
        ("SELECT a.price FROM bid AS a ASOF JOIN bid AS b ON a.ts >= b.ts", "ASOF JOIN"),
        ("SELECT a.price FROM bid AS a SEMI JOIN bid AS b ON a.ts = b.ts", "SEMI JOIN"),
        ("SELECT price FROM bid TABLESAMPLE 10%", "TABLESAMPLE SYSTEM (10 PERCENT)"),
        ("SELECT EXTRACT(EPOCH FROM ts) FROM bid", "EXTRACT(EPOCH)"),
        ("SELECT price::UHUGEINT FROM bid", "type UINT128"),
        ("SELECT x FROM TUMBLE(TABLE (SELECT * FROM bid), DESCRIPTOR(ts), INTERVAL '1' SECOND)", "TUMBLE over a query"),
        ("CREATE MATERIALIZED VIEW v WITH (state_ttl = '1 hour') AS SELECT price FROM bid", "WITH (state_ttl)"),
        (f"CREATE TABLE a (a INT) WITH (topic = 't', format = 'avro', schema = '{SCHEMA}')", "format avro"),
        ("CREATE TABLE a (h BLOB METADATA FROM 'headers', b INT) WITH (topic = 't')", "METADATA FROM 'headers'"),
        ("DROP TABLE bid", "DROP TABLE"),
        ("DROP MATERIALIZED VIEW v", "DROP MATERIALIZED VIEW"),
        ("ALTER SINK s PAUSE", "ALTER SINK"),
        ("SHOW JOBS", "SHOW JOBS"),
        ("SHOW TABLES", "SHOW TABLES"),
        ("EXPLAIN SELECT price FROM bid", "EXPLAIN"),
        ("DESCRIBE bid", "DESCRIBE"),
    ],
)  # fmt: skip
def test_a_clause_that_a_target_lacks_is_named(query: str, what: str, target: str) -> None:
    found = refused(BID + query, target)
    assert f"{what} is not supported for {target}" in found


@pytest.mark.parametrize("target", TARGETS)
def test_names_have_to_be_declared(target: str) -> None:
    assert "'bids' is not declared" in refused(BID + "SELECT price FROM bids", target)
    assert "did you mean 'bid'?" in refused(BID + "SELECT price FROM bids", target)
    assert "'b' is not declared" in refused(
        BID + "SELECT x FROM TUMBLE(TABLE b, DESCRIPTOR(t), INTERVAL '1' DAY)", target
    )
    assert "declare it as a METADATA column" in refused(BID + "SELECT _offset FROM bid", target)
    assert "EMIT ON WINDOW CLOSE needs a window" in refused(BID + "SELECT price FROM bid EMIT ON WINDOW CLOSE", target)


def test_errors_have_their_place_in_the_whole_text() -> None:
    with pytest.raises(InvalidStatement) as error:
        translate(f"{BID}SELECT price,\n  FOO(channel) FROM bid", "flink", servers="h:1")
    assert (error.value.details["line"], error.value.details["column"]) == ("3", "3")
    assert str(error.value) == "line 3, column 3: FOO(channel) is not supported for flink"
    assert refused(f"{BID}SELECT price FRM bid", "spark").startswith("line 2, column 18: ")
    assert "has no end" in refused("SELECT 'abc", "flink")


def test_a_target_has_to_be_known() -> None:
    with pytest.raises(InvalidStatement, match="target is 'oracle', must be one of flink, risingwave, spark"):
        translate("SELECT 1", "oracle", servers="h:1")


def test_semicolons_and_comments_around_statements_are_no_statements() -> None:
    text = f"-- first\n;{BID};\n/* last; */ SELECT 'a;b' AS x FROM bid;\n-- end\n"
    assert [str(found).splitlines()[-1] for found in translate(text, "flink", servers="h:1")] == [");", "FROM `bid`;"]


@pytest.mark.parametrize(
    ("before", "after", "missing"),
    [
        ("SELECT COUNT(*) FILTER (WHERE a > 5) FROM t", "SELECT COUNT(*) FROM t", "FILTER"),
        ("SELECT COUNT(DISTINCT a) FROM t", "SELECT COUNT(a) FROM t", "DISTINCT"),
        ("SELECT a FROM t WHERE b = 5", "SELECT a FROM t WHERE b = 6", "'5'"),
        ("SELECT a, b FROM t", "SELECT a, a FROM t", "'b'"),
        ("SELECT a FROM t LIMIT 3", "SELECT a FROM t", "LIMIT"),
        ("SELECT a FROM t JOIN u ON t.a = u.a", "SELECT a FROM t, u WHERE t.a = u.a", ""),
        ("SELECT LENGTH(a) FROM t", "SELECT LENGTH(a) FROM t", ""),
    ],
)
def test_a_node_that_the_text_does_not_hold_is_seen(before: str, after: str, missing: str) -> None:
    assert module._missing(one_tree(before, StreamHouse), one_tree(after, StreamHouse)) == missing


def test_a_text_that_lost_a_node_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a generator that drops a node that it does not know."""
    plain = module._WRITTEN_AS[exp.Paren]
    monkeypatch.setitem(module._WRITTEN_AS, exp.Paren, (exp.Command,))  # type: ignore[arg-type]
    found = refused(BID + "SELECT (price + 1) * 2 FROM bid", "flink")
    assert found == "the statement cannot be written for Flink: it would lose PAREN" and plain == ()
