"""Statements about the session: transactions, settings, cursors, prepared statements. Pure.

`split` cuts a text into its statements, `command_of` recognises those that the connection answers itself; all others
are for the SQL service. A clause that would change the meaning of such a statement, and cannot be kept, is refused by
name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import sqlglot
from sqlglot.dialects.duckdb import DuckDB
from sqlglot.errors import SqlglotError
from sqlglot.tokenizer_core import Token, TokenType

from streamhouse_sql.pgwire.core.errors import PgError


@dataclass(frozen=True, slots=True)
class Piece:
    """A statement of a text, which begins at character `at`."""

    text: str
    at: int
    tokens: Sequence[Token] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Begin:
    """BEGIN, START TRANSACTION."""


@dataclass(frozen=True, slots=True)
class End:
    """COMMIT (or END), ROLLBACK (or ABORT)."""

    is_commit: bool


@dataclass(frozen=True, slots=True)
class Savepoint:
    """SAVEPOINT, RELEASE, ROLLBACK TO: `what` is the word."""

    what: str
    name: str


@dataclass(frozen=True, slots=True)
class Set:
    """SET. `value` None: the default."""

    name: str
    value: str | None
    is_local: bool = False


@dataclass(frozen=True, slots=True)
class Reset:
    """RESET; None: all settings."""

    name: str | None


@dataclass(frozen=True, slots=True)
class Show:
    """SHOW of a setting; "all" is all."""

    name: str


@dataclass(frozen=True, slots=True)
class Deallocate:
    """DEALLOCATE; None: all statements."""

    name: str | None


@dataclass(frozen=True, slots=True)
class Discard:
    """DISCARD of all, plans, sequences, or temporary tables."""

    what: str


@dataclass(frozen=True, slots=True)
class Declare:
    """DECLARE of a cursor for a query, whose text begins at character `query.at` of the whole text."""

    name: str
    query: Piece
    is_hold: bool


@dataclass(frozen=True, slots=True)
class Fetch:
    """FETCH and MOVE forward. `count` None: all."""

    name: str
    count: int | None
    is_move: bool


@dataclass(frozen=True, slots=True)
class CloseCursor:
    """CLOSE; None: all cursors."""

    name: str | None


@dataclass(frozen=True, slots=True)
class Nothing:
    """A statement that changes nothing here, such as UNLISTEN without a LISTEN."""

    tag: str


Command = Begin | End | Savepoint | Set | Reset | Show | Deallocate | Discard | Declare | Fetch | CloseCursor | Nothing


class _Tokens(DuckDB):
    """DuckDB's tokens; sqlglot makes one of all that follows FETCH or SHOW."""

    class Tokenizer(DuckDB.Tokenizer):
        COMMANDS: ClassVar[set[TokenType]] = set()


# SHOW of these is for the SQL service.
SERVICE_SHOWS = {"TABLES", "TOPICS", "VIEWS", "SINKS", "JOBS"}


def split(text: str) -> list[Piece]:
    """Returns the statements of a text, without those that are empty."""
    try:
        tokens = sqlglot.tokenize(text, dialect=_Tokens)
    except SqlglotError:
        return [Piece(text, 0)]  # the SQL service says the error and its place
    pieces: list[Piece] = []
    begun: list[Token] = []
    for token in tokens:
        if token.token_type != TokenType.SEMICOLON:
            begun.append(token)
        elif begun:
            pieces.append(_piece(text, begun))
            begun = []
    if begun:
        pieces.append(_piece(text, begun))
    return pieces


def _piece(text: str, tokens: list[Token]) -> Piece:
    return Piece(text[tokens[0].start : tokens[-1].end + 1], tokens[0].start, tuple(tokens))


def command_of(piece: Piece) -> Command | None:
    """Returns the command of a statement about the session, None for a statement of the SQL service. Raises PgError."""
    words = _Words(piece)
    first = words.next()
    match first:
        case "BEGIN":
            words.skip("WORK", "TRANSACTION")
            _modes(words)
            return Begin()
        case "START":
            words.must("TRANSACTION")
            _modes(words)
            return Begin()
        case "COMMIT" | "END":
            return _end(words, is_commit=True)
        case "ROLLBACK" | "ABORT":
            words.skip("WORK", "TRANSACTION")
            if words.skip("TO"):
                words.skip("SAVEPOINT")
                return words.last(Savepoint("ROLLBACK", words.name()))
            return _end(words, is_commit=False)
        case "SAVEPOINT":
            return words.last(Savepoint("SAVEPOINT", words.name()))
        case "RELEASE":
            words.skip("SAVEPOINT")
            return words.last(Savepoint("RELEASE", words.name()))
        case "SET":
            return _set(words)
        case "RESET":
            if words.skip("ALL"):
                return words.last(Reset(None))
            return words.last(Reset(_setting(words)))
        case "SHOW":
            if words.peek() in SERVICE_SHOWS:
                return None
            return words.last(Show(_setting(words)))
        case "DEALLOCATE":
            words.skip("PREPARE")
            return words.last(Deallocate(None if words.skip("ALL") else words.name()))
        case "DISCARD":
            what = words.next()
            if what not in ("ALL", "PLANS", "SEQUENCES", "TEMP", "TEMPORARY"):
                raise words.refused(what)
            return words.last(Discard(what))
        case "DECLARE":
            return _declare(words, piece)
        case "FETCH" | "MOVE":
            return _fetch(words, is_move=first == "MOVE")
        case "CLOSE":
            return words.last(CloseCursor(None if words.skip("ALL") else words.name()))
        case "UNLISTEN":
            return Nothing("UNLISTEN")
        case "LISTEN" | "NOTIFY" | "COPY" | "PREPARE" | "EXECUTE" | "LOCK" | "VACUUM" | "DO" | "CALL":
            raise PgError("0A000", f"{first} is not supported", position=piece.at + 1)
    return None


class _Words:
    """The tokens of a statement, taken one by one; words without quotes in capitals."""

    def __init__(self, piece: Piece) -> None:
        self._tokens = piece.tokens
        self._piece = piece
        self._at = 0

    def peek(self) -> str:
        if self._at >= len(self._tokens):
            return ""
        token = self._tokens[self._at]
        quoted = token.token_type in (TokenType.STRING, TokenType.IDENTIFIER)
        return f"'{token.text}'" if quoted else token.text.upper()

    def next(self) -> str:
        word = self.peek()
        self._at += 1
        return word

    def skip(self, *words: str) -> bool:
        """Takes the next word if it is one of these."""
        is_one = self.peek() in words
        self._at += is_one
        return is_one

    def must(self, *words: str) -> None:
        for word in words:
            if self.peek() != word:
                raise self.refused(self.peek())
            self._at += 1

    def name(self) -> str:
        """Returns a name as PostgreSQL folds it."""
        if self._at >= len(self._tokens):
            raise self.refused("")
        token = self._tokens[self._at]
        self._at += 1
        return token.text if token.token_type == TokenType.IDENTIFIER else token.text.lower()

    def value(self) -> str:
        """Returns a setting's value: all that is left."""
        left = self._tokens[self._at :]
        self._at = len(self._tokens)
        return "".join(token.text for token in left)

    @property
    def token(self) -> Token | None:
        return self._tokens[self._at] if self._at < len(self._tokens) else None

    def last(self, command: Command) -> Command:
        """Returns the command if no word is left, else raises."""
        if self._at < len(self._tokens):
            raise self.refused(self.peek())
        return command

    def refused(self, word: str) -> PgError:
        at = self._tokens[min(self._at, len(self._tokens) - 1)].start if self._tokens else self._piece.at
        what = f"at or near {word.strip(chr(39))!r}" if word else "at end of input"
        return PgError("42601", f"syntax error {what}", position=at + 1)


def _end(words: _Words, *, is_commit: bool) -> Command:
    words.skip("WORK", "TRANSACTION")
    if words.skip("AND"):
        if not words.skip("NO"):
            raise PgError("0A000", "AND CHAIN is not supported")
        words.must("CHAIN")
    return words.last(End(is_commit))


def _modes(words: _Words) -> None:
    """Takes transaction modes. Each statement sees the log as it is when the statement starts: READ COMMITTED."""
    while words.peek():
        if words.skip("ISOLATION"):
            words.must("LEVEL")
            level = words.next()
            level += f" {words.next()}" if level in ("READ", "REPEATABLE") else ""
            if level not in ("READ COMMITTED", "READ UNCOMMITTED"):
                raise PgError(
                    "0A000",
                    f"isolation level {level} is not supported: each statement reads the log as it is when it starts "
                    "(READ COMMITTED)",
                )
        elif words.skip("READ"):
            if not words.skip("ONLY", "WRITE"):
                raise words.refused(words.peek())
        elif words.skip("NOT"):
            words.must("DEFERRABLE")
        elif not words.skip("DEFERRABLE", ","):
            raise words.refused(words.peek())


def _set(words: _Words) -> Command:
    is_local = words.skip("LOCAL")
    if not is_local and words.skip("SESSION"):
        if words.skip("CHARACTERISTICS"):
            words.must("AS", "TRANSACTION")
            _modes(words)
            return Nothing("SET")
        if words.skip("AUTHORIZATION"):
            return _role(words)
    if words.skip("TRANSACTION"):
        _modes(words)
        return Nothing("SET")
    if words.skip("ROLE"):
        return _role(words)
    if words.skip("TIME"):
        words.must("ZONE")
        return Set("timezone", None if words.skip("DEFAULT", "LOCAL") else words.value(), is_local)
    if words.skip("NAMES"):
        return Set("client_encoding", None if words.skip("DEFAULT") else words.value(), is_local)
    name = words.name()
    while words.skip("."):
        name = f"{name}.{words.name()}"
    if not words.skip("TO", "="):
        raise words.refused(words.peek())
    if words.skip("DEFAULT"):
        return words.last(Set(name.lower(), None, is_local))
    if not words.peek():
        raise words.refused("")
    return Set(name.lower(), words.value(), is_local)


def _role(words: _Words) -> Command:
    if words.skip("NONE", "DEFAULT"):
        return words.last(Nothing("SET"))
    raise PgError("0A000", "roles are not supported")


def _setting(words: _Words) -> str:
    if words.skip("TIME"):
        words.must("ZONE")
        return "timezone"
    if words.skip("TRANSACTION"):
        words.must("ISOLATION", "LEVEL")
        return "transaction_isolation"
    return words.name().lower()


def _declare(words: _Words, piece: Piece) -> Command:
    name, is_hold = words.name(), False
    while not words.skip("CURSOR"):
        if words.skip("BINARY"):
            raise PgError("0A000", "BINARY cursors are not supported; FETCH has the format that its client asks for")
        if words.skip("NO"):
            words.must("SCROLL")
        elif words.skip("SCROLL"):
            raise PgError("0A000", "SCROLL is not supported: a cursor moves forward only")
        elif not words.skip("INSENSITIVE", "ASENSITIVE"):
            raise words.refused(words.peek())
    if words.skip("WITH"):
        words.must("HOLD")
        is_hold = True
    elif words.skip("WITHOUT"):
        words.must("HOLD")
    words.must("FOR")
    token = words.token
    if token is None:
        raise words.refused("")
    query = piece.text[token.start - piece.at :]
    tokens = tuple(other for other in piece.tokens if other.start >= token.start)
    return Declare(name, Piece(query, token.start, tokens), is_hold)


def _fetch(words: _Words, *, is_move: bool) -> Command:
    count: int | None = 1
    if words.skip("FORWARD"):
        count = _count(words)
    elif words.peek() in ("PRIOR", "FIRST", "LAST", "ABSOLUTE", "RELATIVE", "BACKWARD", "-"):
        raise PgError("55000", f"FETCH {words.peek()} is not supported: a cursor moves forward only")
    elif not words.skip("NEXT"):
        count = _count(words)
    words.skip("FROM", "IN")
    return words.last(Fetch(words.name(), count, is_move))


def _count(words: _Words) -> int | None:
    if words.skip("ALL"):
        return None
    if words.peek().isdigit():
        return int(words.next())
    return 1
