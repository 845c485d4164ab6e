"""Decides on tables that are declared for SQL. Pure.

The coordinator keeps definitions and does not read them: the SQL service has parsed and checked a definition before it
asks for the table.
"""

import re
from collections.abc import Collection

from shproto.errors import InvalidArgument, Overloaded, TableExists, UnknownTable
from shproto.events import SqlTableCreated, SqlTableDropped

from streamhouse_coordinator.core.names import check_text
from streamhouse_coordinator.core.tables import SqlTableRow

_NAME = re.compile(r"[a-z_][a-z0-9_$]{0,127}")
DEFINITION_CHARS_MAX = 256 * 1024


def check_sql_name(field: str, name: str) -> None:
    """Checks the name of a table or job. Raises InvalidArgument."""
    if not _NAME.fullmatch(name):
        raise InvalidArgument(
            f"{field} {name[:300]!r} is not a legal name: 1 to 128 of a-z 0-9 _ $, the first a letter or _",
            field=field,
            value=name[:300],
            limit=128,
        )


def check_create(table: str, definition: str) -> None:
    """Checks a new table. Raises InvalidArgument that names the field, its limit and the value."""
    check_sql_name("table", table)
    check_text("definition", definition, DEFINITION_CHARS_MAX)


def create(
    asked: SqlTableCreated, same_name: Collection[SqlTableRow], has_view: bool, table_count: int, tables_max: int
) -> SqlTableCreated:
    """Returns the event of a new table. `has_view`: a view has its name. Raises TableExists, or Overloaded if there are
    too many tables."""
    if same_name or has_view:
        raise TableExists(f"table {asked.table!r} exists already", table=asked.table)
    if table_count >= tables_max:
        raise Overloaded(
            f"{table_count} tables are declared; the limit sql_tables_max is {tables_max}",
            limit=tables_max,
            value=table_count,
        )
    return asked


def drop(table: str, rows: Collection[SqlTableRow], now_ms: int) -> SqlTableDropped:
    """Returns the event of a dropped table. Raises UnknownTable."""
    for row in rows:
        return SqlTableDropped(row.table_id, row.table_name, now_ms)
    raise UnknownTable(f"there is no table {table!r}", table=table)
