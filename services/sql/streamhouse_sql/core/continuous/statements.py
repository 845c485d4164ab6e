"""Statements about continuous queries: text to a checked statement.

The forms are RisingWave's, whose words for views and sinks PostgreSQL's users know; `INSERT INTO … SELECT` is Flink's
and Kafka users' form of the same. A head is read word by word, so that a clause that is not known is an error that
names it; the query behind it is parsed by sqlglot.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from shproto.errors import InvalidStatement
from sqlglot import exp
from sqlglot.errors import TokenError
from sqlglot.tokenizer_core import Token, TokenType

from streamhouse_sql.core.dialect import StreamHouse, Verbatim
from streamhouse_sql.core.statement import one_tree
from streamhouse_sql.core.windows import TOKENS_MAX, Expansion, Window, with_placeholders

# "live": a query of its own, whose result its client reads as it changes. It is no job, and ends with its client.
Kind = Literal["view", "sink", "insert", "live"]
# How a result is given out: each change at once, or each window once, when it is over.
Emit = Literal["changes", "on window close"]
JOB_KINDS = {"MATERIALIZED VIEW": "view", "SINK": "sink", "JOB": "job"}
# Options of WITH in CREATE MATERIALIZED VIEW and CREATE SINK.
OPTIONS = ("state_ttl",)
NAME_CHARS_MAX = 128
_EXPLAIN = re.compile(r"(?:\s|--[^\n]*(?:\n|$)|/\*.*?\*/)*EXPLAIN\b", re.IGNORECASE | re.DOTALL)
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_$]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class ContinuousQuery:
    """CREATE MATERIALIZED VIEW, CREATE SINK, INSERT INTO … SELECT, or a query with EMIT.

    `name`: of the view or sink, empty for others. `target`: the topic or declared table that a sink or INSERT writes,
    `columns` its columns in the order of the query's, empty: those of the query. `emit` None: not said. `tree`: the
    query, in which `windows` stand as tables of these names. `text`: the statement as it was given.
    """

    kind: Kind
    name: str
    target: str = ""
    columns: tuple[str, ...] = ()
    emit: Emit | None = None
    options: Mapping[str, str]
    if_not_exists: bool = False
    tree: exp.Query
    windows: Mapping[str, Window]
    expansion: Expansion
    text: str

    def tables_named(self) -> set[str]:
        """Returns the names of the tables and topics that the query reads, in small letters."""
        trees: list[exp.Expr] = [self.tree]
        for window in self.windows.values():  # a name, or a query in parentheses
            is_query = window.table.startswith("(")
            trees.append(parse_query(window.table if is_query else f"SELECT * FROM {window.table}"))
        named = {table.name.lower() for tree in trees for table in tree.find_all(exp.Table)}
        return named - set(self.windows)


@dataclass(frozen=True, slots=True)
class ExplainContinuous:
    """EXPLAIN of a continuous query, which does not start."""

    query: ContinuousQuery


@dataclass(frozen=True, slots=True)
class DropJob:
    """DROP MATERIALIZED VIEW, SINK or JOB. `kind`: view, sink, or job for either."""

    kind: str
    name: str
    if_exists: bool


@dataclass(frozen=True, slots=True)
class AlterJob:
    """ALTER MATERIALIZED VIEW, SINK or JOB … PAUSE or RESUME."""

    kind: str
    name: str
    action: Literal["pause", "resume"]


@dataclass(frozen=True, slots=True)
class ShowJobs:
    """SHOW VIEWS, SINKS or JOBS. `kind`: view, sink, or job for all."""

    kind: str


JobStatement = ContinuousQuery | ExplainContinuous | DropJob | AlterJob | ShowJobs


def parse_job_statement(text: str) -> JobStatement | None:
    """Returns the statement about continuous queries in `text`, None if it is another one. Raises InvalidStatement,
    with line and column where they are known."""
    explain = _EXPLAIN.match(text)
    if explain is not None:
        # Blanks in its place: to the tokenizer all that is behind EXPLAIN is a single text.
        explained = parse_job_statement(re.sub(r"[^\n]", " ", explain[0]) + text[explain.end() :])
        return ExplainContinuous(explained) if isinstance(explained, ContinuousQuery) else None
    try:
        tokens = StreamHouse().tokenize(text)
    except TokenError:
        return None  # a text without its end: the parser of other statements says so
    while tokens and tokens[-1].token_type is TokenType.SEMICOLON:
        tokens.pop()
    if len(tokens) > TOKENS_MAX:
        raise InvalidStatement(f"the statement has {len(tokens)} words and signs, at most {TOKENS_MAX} are allowed")
    return _Reader(text, tokens).statement()


class _Reader:
    """Reads a statement from left to right."""

    def __init__(self, text: str, tokens: Sequence[Token]) -> None:
        self._text = text
        self._tokens = tokens
        self._at = 0

    def statement(self) -> JobStatement | None:
        if self._take("SHOW"):
            return self._show()
        if self._take("DROP"):
            return self._drop()
        if self._take("ALTER"):
            return self._alter()
        return self._query_statement() or self._live()

    def _live(self) -> ContinuousQuery | None:
        """Returns the query with EMIT at its end; None without, or for a statement that is no query."""
        if not self._is_at(TokenType.L_PAREN) and not self._is_word(0, "SELECT", "WITH", "FROM", "VALUES"):
            return None
        words = _words(self._tokens)
        if words[-4:-1] == ["EMIT", "CHANGES", "LIMIT"]:  # ksqlDB's form; elsewhere EMIT may be a name
            raise InvalidStatement(
                "LIMIT is not supported behind EMIT CHANGES: a live query ends when its client ends it", clause="LIMIT"
            )
        is_live = any(tuple(words[-len(clause) :]) == clause for clause in _EMITS)
        return self._query("live", "", "", (), {}, False) if is_live else None

    def _query_statement(self) -> ContinuousQuery | None:
        if self._take("CREATE"):
            if self._take("OR", "REPLACE"):
                if self._take("MATERIALIZED") or self._take("SINK"):
                    raise InvalidStatement(
                        "CREATE OR REPLACE is not supported for continuous queries: DROP comes first",
                        clause="OR REPLACE",
                    )
                return None
            if self._take("MATERIALIZED"):
                self._expect("VIEW", "CREATE MATERIALIZED VIEW")
                return self._create("view", "CREATE MATERIALIZED VIEW")
            return self._create("sink", "CREATE SINK") if self._take("SINK") else None
        return self._insert() if self._take("INSERT") else None

    def _create(self, kind: Kind, what: str) -> ContinuousQuery:
        if_not_exists = self._take("IF", "NOT", "EXISTS")
        name = self._name(what)
        if not _IDENTIFIER.fullmatch(name) or len(name) > NAME_CHARS_MAX:
            raise InvalidStatement(
                f"name {name[:NAME_CHARS_MAX]!r} must be letters, digits, _ and $, the first a letter or _; at most "
                f"{NAME_CHARS_MAX} characters",
                clause=name[:NAME_CHARS_MAX],
            )
        target = ""
        if kind == "sink":
            self._expect("INTO", f"{what} {name}")
            target = self._name(f"{what} {name} INTO")
        options = self._options(what) if self._take("WITH") else {}
        self._expect("AS", f"{what} {name}")
        return self._query(kind, name, target, (), options, if_not_exists)

    def _insert(self) -> ContinuousQuery:
        self._expect("INTO", "INSERT")
        target = self._name("INSERT INTO")
        columns: list[str] = []
        # A parenthesis may begin the columns, or the query.
        if self._is_at(TokenType.L_PAREN) and not self._is_word(1, "SELECT", "WITH", "FROM"):
            self._at += 1
            while True:
                columns.append(self._identifier(f"INSERT INTO {target}"))
                if not self._take_sign(TokenType.COMMA):
                    break
            if not self._take_sign(TokenType.R_PAREN):
                raise self._unexpected(f"INSERT INTO {target}", ")")
        if self._is_word(0, "VALUES"):
            raise InvalidStatement(
                "INSERT … VALUES is not supported: records are produced, and INSERT INTO … SELECT starts a job",
                clause="VALUES",
            )
        return self._query("insert", "", target, tuple(columns), {}, False)

    def _query(
        self,
        kind: Kind,
        name: str,
        target: str,
        columns: tuple[str, ...],
        options: Mapping[str, str],
        if_not_exists: bool,
    ) -> ContinuousQuery:
        rest = list(self._tokens[self._at :])
        emit, rest = without_emit(rest)
        if not rest:
            raise InvalidStatement("the statement has no query: SELECT …")
        # Blanks in place of what is around the query: places in errors stay those of the whole text.
        start, end = rest[0].start, rest[-1].end + 1
        text = re.sub(r"[^\n]", " ", self._text[:start]) + self._text[start:end]
        expansion, windows = with_placeholders(text)
        try:
            tree = parse_query(expansion.text)
        except InvalidStatement as error:
            raise expansion.with_place(error) from error.__cause__
        return ContinuousQuery(
            kind=kind,
            name=name,
            target=target,
            columns=columns,
            emit=emit,
            options=options,
            if_not_exists=if_not_exists,
            tree=tree,
            windows=windows,
            expansion=expansion,
            text=self._text,
        )

    def _options(self, what: str) -> dict[str, str]:
        options: dict[str, str] = {}
        if not self._take_sign(TokenType.L_PAREN):
            raise self._unexpected(f"{what} … WITH", "(")
        while True:
            name = self._identifier(f"{what} … WITH").lower()
            if name not in OPTIONS:
                raise InvalidStatement(f"WITH has no option {name!r}; it has {', '.join(OPTIONS)}", clause=name)
            if name in options:
                raise InvalidStatement(f"option {name} is given twice", clause=name)
            if not self._take_sign(TokenType.EQ):
                raise self._unexpected(f"option {name}", "=")
            token = self._next(f"option {name}")
            if token.token_type is not TokenType.STRING:
                raise InvalidStatement(f"option {name} must be a text: {name} = '…'", clause=name)
            options[name] = token.text
            if not self._take_sign(TokenType.COMMA):
                break
        if not self._take_sign(TokenType.R_PAREN):
            raise self._unexpected(f"{what} … WITH", ")")
        return options

    def _show(self) -> ShowJobs | None:
        self._take("MATERIALIZED")
        for word, kind in (("VIEWS", "view"), ("SINKS", "sink"), ("JOBS", "job")):
            if self._take(word):
                self._end(f"SHOW {word}")
                return ShowJobs(kind)
        return None

    def _drop(self) -> DropJob | None:
        found = self._job_kind()
        if found is None:
            return None
        what, kind = f"DROP {found[0]}", found[1]
        if_exists = self._take("IF", "EXISTS")
        name = self._name(what)
        self._end(f"{what} {name}")
        return DropJob(kind, name, if_exists)

    def _alter(self) -> AlterJob | None:
        found = self._job_kind()
        if found is None:
            return None
        what, kind = f"ALTER {found[0]}", found[1]
        name = self._name(what)
        action: Literal["pause", "resume"] = "pause"
        if self._take("RESUME"):
            action = "resume"
        elif not self._take("PAUSE"):
            raise self._unexpected(f"{what} {name}", "PAUSE or RESUME")
        self._end(f"{what} {name} {action.upper()}")
        return AlterJob(kind, name, action)

    def _job_kind(self) -> tuple[str, str] | None:
        for words, kind in JOB_KINDS.items():
            if self._take(*words.split()):
                return words, kind
        return None

    # ---- words

    def _is_word(self, ahead: int, *words: str) -> bool:
        position = self._at + ahead
        if position >= len(self._tokens):
            return False
        token = self._tokens[position]
        return token.token_type not in (TokenType.IDENTIFIER, TokenType.STRING) and token.text.upper() in words

    def _take(self, *words: str) -> bool:
        """Returns True, behind the words, if they are next."""
        # sqlglot's tokenizer makes some pairs of words a single token.
        position, taken = self._at, 0
        while taken < len(words):
            if position >= len(self._tokens):
                return False
            token = self._tokens[position]
            if token.token_type in (TokenType.IDENTIFIER, TokenType.STRING):
                return False
            found = token.text.upper().split()
            if tuple(found) != words[taken : taken + len(found)]:
                return False
            taken += len(found)
            position += 1
        self._at = position
        return True

    def _expect(self, word: str, behind: str) -> None:
        if not self._take(word):
            raise self._unexpected(behind, word)

    def _is_at(self, sign: TokenType) -> bool:
        return self._at < len(self._tokens) and self._tokens[self._at].token_type is sign

    def _take_sign(self, sign: TokenType) -> bool:
        found = self._is_at(sign)
        self._at += found
        return found

    def _next(self, behind: str) -> Token:
        if self._at >= len(self._tokens):
            raise InvalidStatement(f"the statement ends behind {behind}")
        self._at += 1
        return self._tokens[self._at - 1]

    def _identifier(self, behind: str) -> str:
        token = self._next(behind)
        if token.token_type is not TokenType.IDENTIFIER and not _IDENTIFIER.fullmatch(token.text):
            self._at -= 1
            raise self._unexpected(behind, "a name")
        return token.text

    def _name(self, behind: str) -> str:
        """Returns a name, `public.` before it left out."""
        name = self._identifier(behind)
        if self._take_sign(TokenType.DOT):
            if name.lower() != "public":
                raise InvalidStatement(f"there is no schema {name!r}", clause=name)
            name = self._identifier(behind)
        return name

    def _end(self, what: str) -> None:
        if self._at < len(self._tokens):
            raise self._unexpected(what, "the end")

    def _unexpected(self, behind: str, wanted: str) -> InvalidStatement:
        if self._at >= len(self._tokens):
            return InvalidStatement(f"the statement ends behind {behind}; {wanted} is missing")
        token = self._tokens[self._at]
        before = self._text[: token.start]
        line, column = before.count("\n") + 1, token.start - before.rfind("\n")
        return InvalidStatement(
            f"line {line}, column {column}: {token.text} is not supported behind {behind}; {wanted} is expected",
            line=line,
            column=column,
            clause=token.text,
        )


_EMITS: Mapping[tuple[str, ...], Emit] = {
    ("EMIT", "CHANGES"): "changes",
    ("EMIT", "ON", "WINDOW", "CLOSE"): "on window close",
}


def _words(tokens: Sequence[Token]) -> list[str]:
    """Returns the words of a text; names in quotes are empty."""
    return [token.text.upper() if token.token_type is not TokenType.IDENTIFIER else "" for token in tokens]


def without_emit(tokens: list[Token]) -> tuple[Emit | None, list[Token]]:
    """Returns the clause at the end of a query, and the tokens before it. Raises InvalidStatement for another EMIT."""
    words = _words(tokens)
    for clause, emit in _EMITS.items():
        if tuple(words[-len(clause) :]) == clause:
            return emit, tokens[: -len(clause)]
    for position in range(len(words) - 1, max(-1, len(words) - 8), -1):
        if words[position] == "EMIT" and position and tokens[position - 1].token_type is not TokenType.ALIAS:
            found = " ".join(words[position:])
            raise InvalidStatement(
                f"{found} is not supported; EMIT CHANGES and EMIT ON WINDOW CLOSE are, at the end of the query",
                clause=found,
            )
    return None, tokens


def parse_query(text: str) -> exp.Query:
    """Returns the tree of a continuous query. Raises InvalidStatement."""
    tree = one_tree(text, Verbatim)
    while isinstance(tree, exp.Subquery) and not tree.alias:
        tree = tree.this
    if not isinstance(tree, exp.Select | exp.SetOperation):
        name = tree.key.upper()
        raise InvalidStatement(f"{name} is not supported in a continuous query; SELECT is", clause=name)
    for node in tree.walk():
        if isinstance(node, exp.Command):
            raise InvalidStatement(f"{node.sql(Verbatim)} is not supported", clause=node.name)
    return tree
