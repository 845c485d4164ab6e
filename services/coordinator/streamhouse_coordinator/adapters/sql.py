"""Builds the SQL for the port's generic operations. Knows tables and columns, not connections."""

import types
import typing
from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from typing import Any

from streamhouse_coordinator.core.projection import Put, Remove, RowOp, Set
from streamhouse_coordinator.core.tables import Table
from streamhouse_coordinator.ports import Above, AtMost, In, Where

_TYPES = {int: "bigint", str: "text", bool: "boolean", bytes: "bytea"}
# SHARE keeps the rows from being deleted, and lets any number of commits of offsets hold the same topic.
_LOCKS = {"": "", "wait": " FOR UPDATE", "skip": " FOR UPDATE SKIP LOCKED", "share": " FOR SHARE"}

Statement = tuple[str, list[Any]]


@cache
def column_types(table: Table[Any]) -> dict[str, str]:
    """Returns the PostgreSQL type by column name."""
    hints = typing.get_type_hints(table.row)
    return {item.name: _TYPES[_plain(hints[item.name])] for item in fields(table.row)}  # type: ignore[arg-type]


def _plain(hint: Any) -> type:
    """Returns the type without None: `int | None` -> int."""
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    assert isinstance(hint, type)
    return hint


def names(columns: Sequence[str]) -> str:
    """Returns the column names as a list for a statement."""
    return ", ".join(f'"{name}"' for name in columns)


def _unnest(table: Table[Any], columns: Sequence[str], first: int = 1) -> str:
    types_ = column_types(table)
    return ", ".join(f"${first + at}::{types_[name]}[]" for at, name in enumerate(columns))


def where_clause(table: Table[Any], where: Where, arguments: list[Any]) -> str:
    """Returns the condition, empty if there is none; appends its arguments."""
    parts = []
    types_ = column_types(table)
    for name, value in where.equals.items():
        match value:
            case In(values):
                arguments.append(list(values))
                parts.append(f'"{name}" = ANY(${len(arguments)}::{types_[name]}[])')
            case AtMost(limit):
                arguments.append(limit)
                parts.append(f'"{name}" <= ${len(arguments)}')
            case Above(limit):
                arguments.append(limit)
                parts.append(f'"{name}" > ${len(arguments)}')
            case _:
                arguments.append(value)
                parts.append(f'"{name}" = ${len(arguments)}')
    if where.predicate is not None:
        parts.append(where.predicate.sql)
    if where.keys:
        rows = _unnest(table, where.keys, len(arguments) + 1)
        arguments += [[row[at] for row in where.key_rows] for at in range(len(where.keys))]
        parts.append(f"({names(where.keys)}) IN (SELECT * FROM unnest({rows}))")
    if where.after is not None:
        arguments += where.after
        first = len(arguments) - len(where.after) + 1
        values = ", ".join(f"${first + at}" for at in range(len(where.after)))
        parts.append(f"({names(table.key)}) > ({values})")
    return " WHERE " + " AND ".join(parts) if parts else ""


def select(table: Table[Any], where: Where, order: Sequence[str], limit: int | None, lock: str) -> Statement:
    arguments: list[Any] = []
    condition = where_clause(table, where, arguments)
    # A statement that locks several rows locks them in key order.
    order = tuple(order) or (table.key if lock else ())
    ordering = f" ORDER BY {names(order)}" if order else ""
    limiting = f" LIMIT {int(limit)}" if limit is not None else ""
    text = f"SELECT {names(table.columns)} FROM {table.name}{condition}{ordering}{limiting}{_LOCKS[lock]}"
    return text, arguments


def totals(table: Table[Any], where: Where, by: Sequence[str], sums: Sequence[str], maxima: Sequence[str]) -> Statement:
    arguments: list[Any] = []
    condition = where_clause(table, where, arguments)
    types_ = column_types(table)
    summed = [f'octet_length("{name}")' if types_[name] == "bytea" else f'"{name}"' for name in sums]
    shown = [f'"{name}"' for name in by] + ["count(*)"] + [f"coalesce(sum({term}), 0)::bigint" for term in summed]
    shown += [f'max("{name}")' for name in maxima]
    grouping = f" GROUP BY {names(by)}" if by else ""
    return f"SELECT {', '.join(shown)} FROM {table.name}{condition}{grouping}", arguments


def change(group: Sequence[RowOp]) -> Statement:
    """Returns a single statement for a group of projection.coalesce; the statement locks the rows in key order."""
    match group[0]:
        case Put(table, _):
            return _upsert(table, [op.row for op in group if isinstance(op, Put)])
        case Set(table, _, changes):
            return _update(table, sorted(changes), [op for op in group if isinstance(op, Set)])
        case Remove(table, where):
            return _delete(table, tuple(where), [op for op in group if isinstance(op, Remove)])


def _upsert(table: Table[Any], rows: Sequence[Any]) -> Statement:
    columns = table.columns
    others = [name for name in columns if name not in table.key]
    updates = ", ".join(f'"{name}" = excluded."{name}"' for name in others)
    action = f"UPDATE SET {updates}" if updates else "NOTHING"
    # Columns as arrays: the text is the same for any number of rows, and a prepared statement is used again.
    text = (
        f"INSERT INTO {table.name} ({names(columns)}) SELECT * FROM unnest({_unnest(table, columns)}) "
        f"ON CONFLICT ({names(table.key)}) DO {action}"
    )
    return text, [[getattr(row, name) for row in rows] for name in columns]


def _update(table: Table[Any], changed: Sequence[str], ops: Sequence[Set]) -> Statement:
    columns = (*table.key, *changed)
    sets = ", ".join(f'"{name}" = u."{name}"' for name in changed)
    rows = f"unnest({_unnest(table, columns)}) u({names(columns)})"
    text = f"UPDATE {table.name} t SET {sets} FROM {rows} WHERE {_same(table.key)}"
    if len(ops) > 1:
        text = f"{_locked(table, rows, table.key)} {text} AND {_held(table)}"
    arguments = [[op.key[at] for op in ops] for at in range(len(table.key))]
    return text, arguments + [[op.changes[name] for op in ops] for name in changed]


def _delete(table: Table[Any], columns: Sequence[str], ops: Sequence[Remove]) -> Statement:
    rows = f"unnest({_unnest(table, columns)}) u({names(columns)})"
    text = f"DELETE FROM {table.name} t USING {rows} WHERE {_same(columns)}"
    # Conditions on other columns than the key may meet many rows, too.
    if len(ops) > 1 or set(columns) != set(table.key):
        text = f"{_locked(table, rows, columns)} DELETE FROM {table.name} t WHERE {_held(table)}"
    return text, [[op.where[name] for op in ops] for name in columns]


def _same(columns: Sequence[str]) -> str:
    return " AND ".join(f't."{name}" = u."{name}"' for name in columns)


def _locked(table: Table[Any], rows: str, columns: Sequence[str]) -> str:
    """Returns a clause that locks the rows in key order before they change: an UPDATE or DELETE locks in the order of
    its plan, and two in opposite orders would deadlock."""
    key = _key(table)
    locking = f"SELECT {key} FROM {table.name} t JOIN {rows} ON {_same(columns)} ORDER BY {key} FOR UPDATE OF t"
    return f"WITH locked AS MATERIALIZED ({locking})"


def _held(table: Table[Any]) -> str:
    return f"({_key(table)}) IN (SELECT * FROM locked)"


def _key(table: Table[Any]) -> str:
    return ", ".join(f't."{name}"' for name in table.key)
