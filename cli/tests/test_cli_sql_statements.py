"""Statements cut at their semicolons, and places of errors shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlglot.dialects.duckdb import DuckDB
from sqlglot.errors import TokenError
from streamhouse_cli.sql_statements import (
    EXCERPT_CHARS_MAX,
    Statement,
    UnfinishedStatement,
    excerpt,
    is_complete,
    split_statements,
    statements_of,
)

pytestmark = pytest.mark.quick


def texts(source: str) -> list[str]:
    return [statement.text for statement in statements_of(source)]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("", []),
        (" ;; ; -- nothing\n/* here ; */", []),
        ("SELECT 1", ["SELECT 1"]),
        ("SELECT 1;\n SELECT 2 ;", ["SELECT 1", "SELECT 2"]),
        ("SELECT ';' ; SELECT 'it''s;'", ["SELECT ';'", "SELECT 'it''s;'"]),
        ("SELECT E'it\\'s;'; SELECT '\\'; SELECT 3", ["SELECT E'it\\'s;'", "SELECT '\\'", "SELECT 3"]),
        ('SELECT "a;""b" FROM t; x', ['SELECT "a;""b" FROM t', "x"]),
        ("SELECT $$a;b$$; SELECT $tag$ ; $$ ; $tag$", ["SELECT $$a;b$$", "SELECT $tag$ ; $$ ; $tag$"]),
        ("SELECT $1; SELECT a$b$; c", ["SELECT $1", "SELECT a$b$", "c"]),
        ("SELECT 1 -- one; two\n, 2; x", ["SELECT 1 -- one; two\n, 2", "x"]),
        ("SELECT /* a; /* b; */ c; */ 1; x", ["SELECT /* a; /* b; */ c; */ 1", "x"]),
        ("-- first\nSELECT 1; -- last", ["SELECT 1"]),
        ("SELECT 1 --", ["SELECT 1"]),
    ],
)
def test_semicolons_in_quotes_and_comments_are_text(source, found):
    assert texts(source) == found


@pytest.mark.parametrize(
    ("source", "line", "column", "said"),
    [
        ("SELECT 1;\n  SELECT 'abc;", 2, 10, "the text that begins here"),
        ("SELECT 1; SELECT E'abc\\'", 1, 18, "the text that begins here"),
        ('SELECT "abc', 1, 8, "the name"),
        ("/* a /* b */", 1, 1, "the comment"),
        ("SELECT $x$ $$", 1, 8, "the dollar quote"),
        ("SELECT ''';", 1, 10, "the text"),
    ],
)
def test_a_quote_without_end_is_named_with_its_place(source, line, column, said):
    with pytest.raises(UnfinishedStatement, match=said) as caught:
        statements_of(source)
    assert (caught.value.line, caught.value.column) == (line, column)


@pytest.mark.parametrize(
    ("source", "complete"),
    [
        ("SELECT 1;", True),
        ("SELECT 1; -- done", True),
        ("SELECT 1", False),
        ("SELECT 1; SELECT 2", False),
        ("SELECT ';", False),
        ("/* ;", False),
        ("", False),
        ("-- SELECT 1", False),
        (" ; ", True),
    ],
)
def test_a_text_is_complete_behind_its_last_semicolon(source, complete):
    assert is_complete(source) is complete


def test_the_rest_behind_the_last_semicolon_is_told_apart():
    found, rest = split_statements("a; b")
    assert [statement.text for statement in found] == ["a"] and rest is not None and rest.text == "b"


PIECES = st.sampled_from([";", "'", '"', "$$", "$t$", "--", "\n", "/*", "*/", "E'", "\\", "a", " ", "1", "x'", "''"])


@given(st.lists(PIECES, max_size=14).map("".join))
def test_statements_end_where_the_servers_parser_sees_semicolons(source):
    """Two lexers that disagree would send half a statement."""
    try:
        tokens = DuckDB().tokenize(source)
    except TokenError:
        return
    try:
        ours = statements_of(source)
    except UnfinishedStatement:
        return
    expected, current = [], []
    for token in tokens:
        if token.text == ";" and source[token.start : token.end + 1] == ";":
            expected.append(current)
            current = []
        else:
            current.append((token.start, token.end + 1))
    parts = [part for part in [*expected, current] if part]
    assert [statement.start for statement in ours] == [part[0][0] for part in parts]


# ---- places


def test_a_place_in_a_statement_is_a_place_in_its_file():
    _, second = statements_of("SELECT 1;\n  SELECT a,\n  b")
    assert second.place() == (2, 3)
    assert second.place(1, 8) == (2, 10)
    assert second.place(2, 3) == (3, 3)
    assert second.excerpt(1, 8) == ["  SELECT a,", " " * 9 + "^"]


@pytest.mark.parametrize(
    ("source", "column", "lines"),
    [
        ("SELECT x", 8, ["SELECT x", "       ^"]),
        ("SELECT x", 9, ["SELECT x", "        ^"]),
        ("SELECT x", 900, ["SELECT x", "        ^"]),
        ("\tx\x1b[31m", 2, [" x [31m", " ^"]),
        ("'名' x", 5, ["'名' x", "     ^"]),
        ("x", 0, []),
    ],
)
def test_the_caret_is_under_the_place(source, column, lines):
    assert excerpt(source, 1, column) == lines


@pytest.mark.parametrize("line", [0, 2, -1])
def test_a_line_that_is_not_there_has_no_excerpt(line):
    assert excerpt("SELECT 1", line, 1) == []


def test_a_long_line_is_cut_around_the_place():
    source = "a" * 500 + "X" + "b" * 500
    text, caret = excerpt(source, 1, 501)
    assert len(text) <= EXCERPT_CHARS_MAX + 2 and text[caret.index("^")] == "X"
    text, caret = excerpt(source, 1, 1)
    assert text.startswith("aaa") and text.endswith("…") and caret == "^"
    text, caret = excerpt(source, 1, 1001)
    assert text.startswith("…") and text.endswith("b") and text[caret.index("^")] == "b"


def test_a_statement_knows_its_source():
    assert Statement("a; b", 3, "b").place() == (1, 4)
