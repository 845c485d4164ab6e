"""DuckDB, the only module that imports it: an instance per statement, which ends with the statement.

Owns: an instance, its memory and spill files. Does not own: the sources it reads (scan.py).
Invariants: an instance reads no file, loads no extension and cannot change its own settings; it knows the tables that
were given to it, and no others. All calls block: they run in the statement's thread, `interrupt` alone in another.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
from shproto.errors import InvalidStatement, StatementFailed, StatementLimit, StreamHouseError
from shruntime import files
from shruntime.settings import SettingsError

from streamhouse_sql.ports import Interrupted, Source


@dataclass(frozen=True, slots=True, kw_only=True)
class DuckLimits:
    """Limits of an instance. `temp_dir`: of its spill files, which exist while they are used."""

    memory_bytes_max: int
    temp_dir: Path
    temp_bytes_max: int
    threads: int


# Rows of a batch in which a result is fetched: what a result may have beyond its limit.
FETCH_ROWS = 16_384
_NO_VALUES: Mapping[str, object] = {}


def open_temp_dir(path: Path) -> None:
    """Makes the directory of the spill files, which hold records, for this user alone. Raises SettingsError if it
    cannot be made or is another user's; DuckDB itself would spill where everybody can read."""
    try:
        files.make_directory(path)
        is_private = files.make_private(path)
    except OSError as error:
        raise SettingsError(f"sql_temp_dir {path} cannot be used: {error.strerror}") from error
    if not is_private:
        raise SettingsError(f"sql_temp_dir {path} cannot be used: it is another user's, who could read what is spilled")


class Duck:
    """An instance. Raises InvalidStatement, StatementFailed and StatementLimit with DuckDB's own words."""

    def __init__(self, limits: DuckLimits) -> None:
        self._reader: Any = None
        self._fetch_bytes_max = limits.memory_bytes_max
        self._connection = duckdb.connect(
            ":memory:",
            config={
                "memory_limit": f"{limits.memory_bytes_max}B",
                "temp_directory": str(limits.temp_dir),
                "max_temp_directory_size": f"{limits.temp_bytes_max}B",
                "threads": limits.threads,
                "autoinstall_known_extensions": False,
                "autoload_known_extensions": False,
                "allow_community_extensions": False,
                "python_enable_replacements": False,
            },
        )
        # Not in `config`: an instance that is opened without access to files cannot be given a directory to spill to.
        self._connection.execute("SET enable_external_access = false")
        self._connection.execute("SET TimeZone = 'UTC'")
        self._connection.execute("SET lock_configuration = true")

    @property
    def version(self) -> str:
        """Version of DuckDB: another one may compute other rows."""
        return str(duckdb.__version__)

    def add_table(self, name: str, source: Source) -> None:
        """Makes the source readable as the table `name`."""
        with _as_ours():
            self._connection.register(name, source)

    def timestamp_ms(self, expression: str) -> int | None:
        """Returns the value of a constant expression as a timestamp in ms; None if it is none, which the query itself
        will tell."""
        try:
            rows = self._connection.execute(f"SELECT epoch_ms(CAST({expression} AS TIMESTAMPTZ))").fetchall()
        except duckdb.Error:
            return None
        return None if rows[0][0] is None else int(rows[0][0])

    def result(self, sql: str, rows_max: int) -> tuple[Any, Iterator[Any]]:
        """Runs a query. Returns the Arrow schema and an iterator of record batches of at most `rows_max` rows; the
        query goes on as the batches are taken."""
        with _as_ours():
            self._reader = self._connection.sql(self._checked(sql)).to_arrow_reader(rows_max)
        return self._reader.schema, self._batches()

    def typed_result(
        self, sql: str, values: Mapping[str, object], rows_max: int, cast: Callable[[str], str]
    ) -> tuple[list[tuple[str, str]], Iterator[Any]]:
        """Runs a query with values for its parameters. Returns names and types of its columns, and an iterator of
        record batches of at most `rows_max` rows. `cast` returns, for the type of a column, the expression over `{}`
        that the column is handed over as."""
        with _as_ours():
            relation = self._relation(sql, values)
            names, types = list(relation.columns), [str(kind) for kind in relation.types]
            handed_over = [cast(kind).format(f"#{at}") for at, kind in enumerate(types, 1)]
            if any(text != f"#{at}" for at, text in enumerate(handed_over, 1)):
                relation = relation.project(", ".join(f"{text} AS c{at}" for at, text in enumerate(handed_over)))
            self._reader = relation.to_arrow_reader(rows_max)
        return list(zip(names, types, strict=True)), self._batches()

    def _relation(self, sql: str, values: Mapping[str, object]) -> Any:
        """Returns a planned query."""
        self._checked(sql)
        return self._connection.sql(sql, params=dict(values)) if values else self._connection.sql(sql)

    def run(self, sql: str) -> None:
        """Runs a statement of ours, such as CREATE."""
        with _as_ours():
            self._connection.execute(sql)

    def fetch(self, sql: str, values: Sequence[object] = ()) -> Any:
        """Returns the whole result of a query of ours as a `pyarrow.Table`. Raises StatementLimit for one above
        the instance's memory limit: DuckDB does not count what it hands over."""
        batches: list[Any] = []
        size_bytes = 0
        with _as_ours():
            relation = self._connection.sql(sql, params=list(values)) if values else self._connection.sql(sql)
            with relation.to_arrow_reader(FETCH_ROWS) as reader:
                for batch in reader:
                    size_bytes += batch.nbytes
                    if size_bytes > self._fetch_bytes_max:
                        raise StatementLimit(
                            f"a result, or a table of the state, has more than {self._fetch_bytes_max} bytes, the "
                            "memory limit",
                            limit="sql_job_memory_bytes_max",
                            value=size_bytes,
                        )
                    batches.append(batch)
                return pa.Table.from_batches(batches, reader.schema)

    def remove_table(self, name: str) -> None:
        """Forgets a table that `add_table` made readable."""
        self._connection.unregister(name)

    def roll_back(self) -> None:
        """Takes back the statements since BEGIN; nothing happens outside of a transaction."""
        while True:
            try:
                self._connection.rollback()
            except duckdb.InterruptException:  # of an interrupt that came late: the transaction must not stay open
                continue
            except duckdb.TransactionException:
                pass
            return

    def make_table(self, name: str, table: Any) -> None:
        """Makes or replaces a table of the instance, which all its connections see, with the rows of a
        `pyarrow.Table`."""
        self._connection.register("made", table)
        self.run(f"CREATE OR REPLACE TABLE {name} AS SELECT * FROM made")
        self._connection.unregister("made")

    def cursor(self) -> Duck:
        """Returns a second connection to the instance, with tables of its own beside the instance's."""
        other = Duck.__new__(Duck)
        other._connection, other._reader = self._connection.cursor(), None
        other._fetch_bytes_max = self._fetch_bytes_max
        return other

    def _batches(self) -> Iterator[Any]:
        # The reader is the instance's: one that a suspended caller held would keep memory and files after `close`.
        while self._reader is not None:
            with _as_ours():
                try:
                    batch = self._reader.read_next_batch()
                except StopIteration:
                    return
            yield batch
        raise Interrupted

    def columns(self, sql: str, values: Mapping[str, object] = _NO_VALUES) -> list[tuple[str, str]]:
        """Returns names and types of a query's columns; the query is planned, and does not run."""
        with _as_ours():
            relation = self._relation(sql, values)
            return [(name, str(kind)) for name, kind in zip(relation.columns, relation.types, strict=True)]

    def plan(self, sql: str) -> str:
        """Returns DuckDB's plan of a query as text."""
        with _as_ours():
            rows = self._connection.execute(f"EXPLAIN {self._checked(sql)}").fetchall()
        return "\n".join(str(row[1]) for row in rows)

    def _checked(self, sql: str) -> str:
        """Returns the text, which is a single query also as DuckDB reads it. Raises InvalidStatement."""
        statements = self._connection.extract_statements(sql)
        if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
            raise InvalidStatement("the statement is not a single query")
        return sql

    def interrupt(self) -> None:
        """Ends the statement that runs in another thread; it raises Interrupted there."""
        with contextlib.suppress(duckdb.ConnectionException):  # closed meanwhile: the statement is over
            self._connection.interrupt()

    def close(self) -> None:
        """Gives memory and spill files back, also of a result that is not read to its end."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()
        self._connection.close()


# DuckDB shows the line of the text that it was given, which is not the user's.
_LINE = re.compile(r"\n\s*\nLINE \d+:.*", re.DOTALL)
_KIND = re.compile(r"^[A-Z][A-Za-z -]* Error: ")
_TABLE = re.compile(r"\b_*scan_\d+\b")
# The texts of an Arrow stream's failure; DuckDB passes on the stream's text, and no type.
_INVALID = (duckdb.ParserException, duckdb.BinderException, duckdb.CatalogException, duckdb.SyntaxException)


class _as_ours:
    """Turns DuckDB's errors into ours."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, StopIteration | StreamHouseError):
            return
        message = _KIND.sub("", _LINE.sub("", str(error))).strip()
        if isinstance(error, duckdb.InterruptException) or "INTERRUPT Error" in str(error):
            raise Interrupted from error
        if isinstance(error, duckdb.OutOfMemoryException) or "Out of Memory Error" in str(error):
            raise StatementLimit(
                f"the statement needs more memory than sql_memory_bytes_max, or more disk than sql_temp_bytes_max: "
                f"{message.splitlines()[0]}",
                limit="sql_memory_bytes_max",
            ) from error
        if isinstance(error, _INVALID):
            raise InvalidStatement(_TABLE.sub("the topic", message)) from error
        if isinstance(error, duckdb.Error | OSError):
            raise StatementFailed(message) from error
