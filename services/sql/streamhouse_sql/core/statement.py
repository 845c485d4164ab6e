"""Text to a checked statement.

A clause that is not supported is refused by name: nothing is parsed and ignored. sqlglot turns statements that it does
not know into an opaque `Command`, so each tree that contains one is refused. A query runs as its own text: its tree is
for the checks and the names in it. sqlglot rewrites expressions for other dialects, and `_value ->> 'a.b'`, written
from the tree, had become the path a, b.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import sqlglot
from shproto.errors import InvalidStatement
from sqlglot import exp
from sqlglot.errors import ErrorLevel, ParseError, SqlglotError, TokenError

from streamhouse_sql.core.dialect import StreamHouse
from streamhouse_sql.core.tables import TableDefinition, define
from streamhouse_sql.core.windows import Expansion, expanded

DIALECT = StreamHouse

# Blanks and comments.
_GAP = r"(?:\s|--[^\n]*(?:\n|$)|/\*.*?\*/)*"
_FLAGS = re.IGNORECASE | re.DOTALL
_EXPLAIN = re.compile(rf"{_GAP}EXPLAIN\b", _FLAGS)
_ANALYZE = re.compile(rf"{_GAP}ANALYZE\b", _FLAGS)
_DESCRIBE = re.compile(rf"{_GAP}DESC(?:RIBE)?\b", _FLAGS)
_SHOW = re.compile(rf"{_GAP}SHOW\s+(\w+){_GAP};?{_GAP}$", _FLAGS)
_CREATE_SOURCE = re.compile(rf"^({_GAP}CREATE\s+)SOURCE(\s)", _FLAGS)
_FIRST_WORD = re.compile(rf"{_GAP}(\w+)", _FLAGS)
# Of statements that are supported; where another statement has an error of syntax, the word is the reason.
_FIRST_WORDS = {"SELECT", "FROM", "WITH", "VALUES", "TABLE", "EXPLAIN", "DESCRIBE", "DESC", "SHOW", "CREATE", "DROP"}
# Of sqlglot's tokenizer.
_MISSING = re.compile(r"Missing (?P<token>\S+) from (?P<line>\d+):\d+$")


@dataclass(frozen=True, slots=True)
class Query:
    """A bounded query: SELECT, VALUES, or set operations over them. `text`: the places in the tree are those of it.
    `expansion`: says where these are in the text that was given."""

    tree: exp.Query
    text: str
    expansion: Expansion


@dataclass(frozen=True, slots=True)
class Explain:
    """EXPLAIN of a bounded query."""

    query: Query


@dataclass(frozen=True, slots=True)
class ShowTables:
    """SHOW TABLES: the topics."""


@dataclass(frozen=True, slots=True)
class Describe:
    """DESCRIBE of a topic, or of a query's result."""

    topic: str | None
    query: Query | None = None


@dataclass(frozen=True, slots=True)
class CreateTable:
    """CREATE TABLE, also called CREATE SOURCE."""

    definition: TableDefinition
    if_not_exists: bool


@dataclass(frozen=True, slots=True)
class DropTable:
    """DROP TABLE: the declaration goes, the topic stays."""

    name: str
    if_exists: bool


Statement = Query | Explain | ShowTables | Describe | CreateTable | DropTable

SUPPORTED = "SELECT, VALUES, EXPLAIN, DESCRIBE, SHOW TABLES, CREATE TABLE and DROP TABLE"


def parse(text: str, *, parameters: bool = False) -> Statement:
    """Returns the statement of `text`, a query of which may have parameters ($1) if the caller has values for them.
    Raises InvalidStatement, with line and column where they are known."""
    explain = _EXPLAIN.match(text)
    if explain is not None:
        if _ANALYZE.match(text, explain.end()):
            raise InvalidStatement("EXPLAIN ANALYZE is not supported; EXPLAIN is", clause="EXPLAIN ANALYZE")
        text = _behind(text, explain)
    elif show := _SHOW.match(text):
        if show[1].upper() not in ("TABLES", "TOPICS"):
            raise InvalidStatement(f"SHOW {show[1].upper()} is not supported; SHOW TABLES is", clause=f"SHOW {show[1]}")
        return ShowTables()
    expansion = expanded(text)
    try:
        if explain is not None:
            return Explain(_query(one_tree(expansion.text), expansion.text, expansion))
        return _statement(expansion, parameters=parameters)
    except InvalidStatement as error:
        raise expansion.with_place(error) from error.__cause__


def _statement(expansion: Expansion, *, parameters: bool) -> Statement:
    text = expansion.text
    # As long as the other word, so that places in errors stay those of the text.
    tree = one_tree(_CREATE_SOURCE.sub(r"\1TABLE \2", text))
    if isinstance(tree, exp.Describe):
        return _describe(tree, text, expansion)
    if isinstance(tree, exp.Create) and tree.kind == "TABLE" and not tree.args.get("expression"):
        _check_written(tree)
        return CreateTable(define(tree), bool(tree.args.get("exists")))
    if isinstance(tree, exp.Drop):
        return _drop(tree)
    return _query(tree, text, expansion, parameters=parameters)


def query_of_table(name: str) -> Query:
    """Returns `SELECT * FROM name`, so that DESCRIBE finds and refuses names as a query does."""
    text = f"SELECT * FROM {exp.to_identifier(name).sql(DIALECT)}"
    return _query(one_tree(text), text, Expansion(text, text))


def _behind(text: str, word: re.Match[str]) -> str:
    """Returns the text with blanks in place of its beginning: places in errors stay those of the whole text."""
    return re.sub(r"[^\n]", " ", text[: word.end()]) + text[word.end() :]


def one_tree(text: str, dialect: type[StreamHouse] = DIALECT) -> exp.Expr:
    """Returns the tree of the only statement of a text. Raises InvalidStatement."""
    try:
        # A comment behind the last semicolon is a tree of its own.
        trees = [tree for tree in sqlglot.parse(text, dialect=dialect) if not isinstance(tree, exp.Semicolon | None)]
    except ParseError as error:
        raise _invalid(text, error) from error
    except TokenError as error:
        raise _without_end(error) from error
    except RecursionError:
        raise InvalidStatement("the statement is nested too deeply") from None
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        # A text for which sqlglot's parser is not prepared, such as `SELECT {: 1}`.
        raise InvalidStatement("the statement has an error of syntax") from error
    if not trees:
        raise InvalidStatement("the statement is empty")
    if len(trees) > 1:
        raise InvalidStatement(f"there are {len(trees)} statements; run them one by one")
    return trees[0]


def _query(tree: exp.Expr, text: str, expansion: Expansion, *, parameters: bool = False) -> Query:
    if isinstance(tree, exp.Values):
        tree = exp.select("*").from_(tree)
    if not isinstance(tree, exp.Query):
        word = _FIRST_WORD.match(tree.sql(DIALECT))
        name = word[1].upper() if word else type(tree).__name__.upper()
        raise InvalidStatement(f"{name} is not supported; supported are {SUPPORTED}", clause=name)
    for node in tree.walk():
        if isinstance(node, exp.Command | exp.DDL | exp.DML) and not isinstance(node, exp.Query):
            name = node.key.upper()
            raise InvalidStatement(f"{name} is not supported inside a query", clause=name)
        if isinstance(node, exp.Into):
            raise InvalidStatement("SELECT INTO is not supported", clause="INTO")
        if isinstance(node, exp.Lock):
            raise InvalidStatement("FOR UPDATE and FOR SHARE are not supported: records never change", clause="FOR")
        if isinstance(node, exp.Parameter | exp.Placeholder) and not parameters:
            raise InvalidStatement(
                f"{node.sql(DIALECT)} is a parameter, and there is no value for it here", clause=node.sql(DIALECT)
            )
    return Query(tree, text, expansion)


def _check_written(tree: exp.Expr) -> None:
    """Refuses a tree that its own text does not give again: a generator drops a node that it does not know without a
    word, and another statement would run than was asked for."""
    try:
        written = tree.sql(DIALECT, unsupported_level=ErrorLevel.RAISE)
        again = sqlglot.parse_one(written, dialect=DIALECT)
    except SqlglotError as error:
        raise InvalidStatement(f"the statement has a clause that is not supported: {error}") from error
    if again.sql(DIALECT) != written or _kinds(again) != _kinds(tree):
        raise InvalidStatement("the statement has a clause that is not supported")


def _kinds(tree: exp.Expr) -> dict[str, int]:
    """Returns how often each kind of node is in the tree, parentheses aside, which writing adds and leaves out."""
    counts: dict[str, int] = {}
    for node in tree.walk():
        if not isinstance(node, exp.Paren):
            counts[node.key] = counts.get(node.key, 0) + 1
    return counts


def _drop(tree: exp.Drop) -> DropTable:
    tables = tree.args.get("tables") or []
    for argument in tree.args:
        if tree.args[argument] and argument not in ("tables", "kind", "exists"):
            raise InvalidStatement(f"{argument.upper()} is not supported in DROP TABLE", clause=argument.upper())
    if tree.kind != "TABLE" or len(tables) != 1 or not isinstance(tables[0].this, exp.Identifier):
        raise InvalidStatement(f"{tree.sql(DIALECT)} is not supported; DROP TABLE name is", clause="DROP")
    return DropTable(tables[0].name, bool(tree.args.get("exists")))


def _describe(tree: exp.Describe, text: str, expansion: Expansion) -> Describe:
    described = tree.this
    word = _DESCRIBE.match(text)
    if isinstance(described, exp.Query) and word is not None:
        return Describe(None, _query(described, _behind(text, word), expansion))
    if isinstance(described, exp.Table) and isinstance(described.this, exp.Identifier):
        return Describe(described.name)
    raise InvalidStatement("DESCRIBE takes the name of a topic, or a SELECT")


def _without_end(error: TokenError) -> InvalidStatement:
    """Returns the error of a text, a quoted name or a comment that has no end."""
    missing = _MISSING.match(str(error.__cause__))
    if missing is None:
        return InvalidStatement("the statement has a comment or a text without its end")
    line = int(missing["line"])  # the tokenizer's column is not that of the line
    return InvalidStatement(f"line {line}: a text or name has no end: {missing['token']} is missing", line=line)


def _invalid(text: str, error: ParseError) -> InvalidStatement:
    word = _FIRST_WORD.match(text)
    if word is not None and word[1].upper() not in _FIRST_WORDS:
        name = word[1].upper()
        return InvalidStatement(f"{name} is not supported; supported are {SUPPORTED}", clause=name)
    found = error.errors[0] if error.errors else {}
    problem = str(found.get("description") or str(error).split(" Line ")[0].strip()).strip(". ")
    highlight = str(found.get("highlight") or "")
    if highlight:
        problem = f"{problem} at {highlight!r}"
    if not found.get("line"):
        return InvalidStatement(problem)
    # The place is the last character of the token; readers look for the first.
    line, column = int(found["line"]), max(1, int(found["col"]) - len(highlight) + 1)
    return InvalidStatement(f"line {line}, column {column}: {problem}", line=line, column=column)
