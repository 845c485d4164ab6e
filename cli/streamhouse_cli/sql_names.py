"""Names of tables and columns for the completion of the SQL shell.

Owns: the last answers of SHOW TABLES and DESCRIBE, and the task that asks for new ones. Does not own: the connection.
Invariants: one question runs at a time. Completion never waits, and never shows an error: names of a question that
failed are missing, and the question is repeated after KEPT_S.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from shproto.errors import StreamHouseError, Unavailable
from shruntime.tasks import cancel_and_wait

from streamhouse_cli.sql_statements import UnfinishedStatement, split_statements

if TYPE_CHECKING:
    from prompt_toolkit.completion import Completer
    from streamhouse import Sql

log = logging.getLogger(__name__)

# Topics come and go rarely beside what is typed; a question takes milliseconds.
KEPT_S = 15.0
ANSWER_TIMEOUT_MS = 5_000
# Tables with columns that are kept: more than a session names.
DESCRIBED_MAX = 200

KEYWORDS = (
    "ALL", "ALTER", "ANALYZE", "AND", "ANY", "AS", "ASC", "BETWEEN", "BY", "CASE", "CAST", "CHANGES", "CLOSE",
    "COUNT", "CREATE", "CROSS", "CUMULATE", "CURRENT_TIMESTAMP", "DATE", "DESC", "DESCRIBE", "DESCRIPTOR",
    "DISTINCT", "DROP", "ELSE", "EMIT", "END", "EXCEPT", "EXISTS", "EXPLAIN", "EXTRACT", "FALSE", "FETCH",
    "FILTER", "FIRST", "FOLLOWING", "FOR", "FORMAT", "FROM", "FULL", "GROUP", "HAVING", "HOP", "IF", "ILIKE",
    "IN", "INNER", "INSERT", "INTERSECT", "INTERVAL", "INTO", "IS", "JOBS", "JOIN", "KEY", "LAST", "LATERAL",
    "LEFT", "LIKE", "LIMIT", "MATERIALIZED", "NATURAL", "NOT", "NULL", "NULLS", "OFFSET", "ON", "OR", "ORDER",
    "OUTER", "OVER", "PARTITION", "PAUSE", "PRECEDING", "PRIMARY", "QUALIFY", "RANGE", "RESUME", "RIGHT", "ROW",
    "ROWS", "SELECT", "SESSION", "SHOW", "SINK", "SINKS", "SUM", "TABLE", "TABLES", "THEN", "TIMESTAMP", "TOPIC",
    "TRUE", "TUMBLE", "UNBOUNDED", "UNION", "UNNEST", "USING", "VALUES", "VIEW", "VIEWS", "WATERMARK", "WHEN",
    "WHERE", "WINDOW", "WITH",
)  # fmt: skip
_WORD = re.compile(r"[A-Za-z_][\w.]*\Z")
_NAMED = re.compile(r'"((?:[^"]|"")+)"|([A-Za-z_]\w*)')
_BEFORE_TABLE = re.compile(r"\b(?:from|join|into|table|describe|desc)\s+[\w.]*\Z", re.IGNORECASE)
_CURSOR = "\x01"  # in no statement
_PLAIN_NAME = re.compile(r"[A-Za-z_]\w*")


class Names:
    """Tables by name, and columns of those that were named."""

    def __init__(self, sql: Sql) -> None:
        self._sql = sql
        self._task: asyncio.Task[None] | None = None
        self.tables: tuple[str, ...] = ()
        self._columns: dict[str, tuple[str, ...]] = {}
        self._asked_s: dict[str, float] = {}  # by table; "" for the list of tables

    async def load(self) -> None:
        """Asks for the tables, as the first contact to the service. Raises Unavailable."""
        self._asked_s[""] = asyncio.get_running_loop().time()
        try:
            self.tables = await self._first_column("SHOW TABLES")
        except Unavailable:
            raise
        except StreamHouseError as error:  # a busy service, or one that has other words for it: it is there
            log.debug("no names for completion: %s", error)

    def columns(self, table: str) -> tuple[str, ...]:
        """Returns the columns of a table as last known; empty if they were not asked for yet."""
        return self._columns.get(table, ())

    def refresh(self, tables: Iterable[str]) -> None:
        """Asks in the background for the list of tables and the columns of these, as far as they are old."""
        if self._task is not None and not self._task.done():
            return
        oldest_s = asyncio.get_running_loop().time() - KEPT_S
        wanted = [name for name in ("", *tables) if self._asked_s.get(name, -KEPT_S) < oldest_s]
        if wanted:
            self._task = asyncio.create_task(self._ask(wanted), name="names for completion")

    def forget(self) -> None:
        """Has everything asked for again with the next completion: a statement may have changed it."""
        self._asked_s.clear()

    async def _ask(self, wanted: Iterable[str]) -> None:
        for name in wanted:
            self._asked_s[name] = asyncio.get_running_loop().time()
            try:
                if name:
                    self._columns[name] = await self._first_column(f"DESCRIBE {quoted_name(name)}")
                else:
                    self.tables = await self._first_column("SHOW TABLES")
            except StreamHouseError as error:  # the user's own statement will say so
                log.debug("no names for completion: %s", error)
                self._columns.pop(name, None)
        for name in list(self._columns)[:-DESCRIBED_MAX]:
            del self._columns[name]
            self._asked_s.pop(name, None)

    async def _first_column(self, statement: str) -> tuple[str, ...]:
        table = await self._sql(statement, timeout_ms=ANSWER_TIMEOUT_MS).to_arrow()
        # A table may have the name of its topic.
        return tuple(dict.fromkeys(map(str, table.column(0).to_pylist()))) if table.num_columns else ()

    async def close(self) -> None:
        """Ends the question that still runs."""
        if self._task is not None:
            await cancel_and_wait(self._task)


def quoted_name(name: str) -> str:
    """Returns the name of a table or column as a statement has it: in quotes, unless it is a plain word or quoted."""
    if _PLAIN_NAME.fullmatch(name) or name[:1] == '"':
        return name
    return '"' + name.replace('"', '""') + '"'


def completions(text: str, names: Names, commands: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Yields what may follow `text`, the text before the cursor, each with the number of characters that it
    replaces. Has `names` refreshed as needed."""
    if text.startswith("\\"):
        command, apart, argument = text.partition(" ")
        if not apart:
            yield from ((name, len(text)) for name in commands if name.startswith(command))
        elif command == "\\d":
            names.refresh(())
            yield from ((quoted_name(name), len(argument)) for name in names.tables if name.startswith(argument))
        return
    try:
        _, statement = split_statements(text + _CURSOR)
    except UnfinishedStatement:
        return
    if statement is None or not statement.text.endswith(_CURSOR):  # in a comment
        return
    mentioned = _mentioned(statement.text, names.tables)
    names.refresh(mentioned)
    word = _WORD.search(text)
    if word is None:
        if text[-1:].isspace() and _BEFORE_TABLE.search(text):
            yield from ((quoted_name(name), 0) for name in names.tables)
        return
    table, dot, start = word[0].rpartition(".")
    if dot:
        owners = [table] if table in mentioned else mentioned
        yield from _matching(start, [column for owner in owners for column in names.columns(owner)])
    elif _BEFORE_TABLE.search(text):
        yield from _matching(start, names.tables)
    else:
        columns = [column for owner in mentioned for column in names.columns(owner)]
        words = [word.lower() for word in KEYWORDS] if start.islower() else KEYWORDS
        yield from _matching(start, [*columns, *names.tables, *words])


def _mentioned(statement: str, tables: Iterable[str]) -> list[str]:
    """Returns the tables that a statement names, in its order."""
    known = set(tables)
    found = (match[1].replace('""', '"') if match[1] else match[2] for match in _NAMED.finditer(statement))
    return list(dict.fromkeys(name for name in found if name in known))


def _matching(start: str, candidates: Iterable[str]) -> Iterator[tuple[str, int]]:
    wanted = start.lower()
    for name in dict.fromkeys(candidates):
        if name.lower().startswith(wanted):
            yield quoted_name(name), len(start)


def completer(names: Names, commands: Iterable[str]) -> Completer:
    """Returns the completer of the shell's prompt."""
    from prompt_toolkit.completion import Completer, Completion

    class SqlCompleter(Completer):
        def get_completions(self, document: Any, event: Any) -> Iterator[Completion]:
            for text, replaced in completions(document.text_before_cursor, names, commands):
                yield Completion(text, start_position=-replaced)

    return SqlCompleter()
