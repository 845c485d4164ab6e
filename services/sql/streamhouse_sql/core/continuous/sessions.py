"""SESSION windows: sessions that are open, and those that have ended.

Invariants of the state: one row per open session, with the times of its first and last row; sessions of a key are
further apart than the gap. A session has ended when the watermark is beyond its last row by more than the gap: a row at
exactly that distance still belongs to it.
"""

from __future__ import annotations

from shproto.errors import InvalidStatement

from streamhouse_sql.core.continuous.build import Builder, Relation, differences, listed, same
from streamhouse_sql.core.continuous.event_time import Below, aligned, timestamp
from streamhouse_sql.core.continuous.groups import Columns, columns_of, key_of, shown_windows
from streamhouse_sql.core.continuous.model import AFTER_US, Guard
from streamhouse_sql.core.continuous.nodes import Group
from streamhouse_sql.core.quoting import quoted

_EACH_ADVANCE = Guard(step_us=1, offset_us=0)


def sessions(builder: Builder, node: Group, source: Relation, below: Below) -> Relation:
    """Returns the sessions that have ended, each once, or with EMIT CHANGES the changes of open sessions."""
    gap = below.node.window.sizes["GAP"]
    windows = {name: below.names[sql[1:-1]] for name, sql in node.keys if sql[1:-1] in below.names}
    keys = [(name, sql) for name, sql in node.keys if name not in windows]
    if {sql.lower() for _, sql in keys} != {key.lower() for key in below.node.window.keys}:
        raise InvalidStatement(
            "GROUP BY over SESSION needs the columns of its PARTITION BY, window_start and window_end, and no others",
            clause="GROUP BY",
        )
    if not windows:
        raise InvalidStatement("GROUP BY over SESSION needs window_start and window_end", clause="GROUP BY")
    if any(call.distinct for _, call in node.aggregates):
        raise InvalidStatement("count(DISTINCT …) over SESSION is not supported", clause="DISTINCT")
    operator = f"aggregate by {', '.join(sql for _, sql in node.keys)} in sessions"
    builder.operators.append(operator)
    columns = columns_of(node, weighted=False)
    names = [name for name, _ in keys]
    new = builder.new("d")
    builder.make(new, _of_rows(source.sql, keys, columns, gap))
    state = builder.state(
        f"SELECT * FROM {new}", operator=operator, holds="a row for each open session", bound="window"
    )
    old = builder.new("d")
    builder.make(old, f"SELECT s.* FROM {state} AS s SEMI JOIN {new} AS n ON {same('s', 'n', names)}")
    merged = builder.new("d")
    builder.make(merged, _merged(new, old, names, columns, gap))
    builder.do(f"DELETE FROM {state} AS s WHERE EXISTS (SELECT 1 FROM {new} AS n WHERE {same('s', 'n', names)})")
    builder.do(f"INSERT INTO {state} SELECT * FROM {merged}")
    has_ended = f'"#t1" + {gap} < {AFTER_US}'
    key, sort = key_of(node, windows)
    if builder.options.emit_on_close:
        ended = builder.new("d")
        rows = f"SELECT * FROM {state} WHERE {has_ended}"
        builder.make(ended, _shown(node, rows, columns, windows, below), _EACH_ADVANCE)
        builder.do(f"DELETE FROM {state} WHERE {has_ended}", _EACH_ADVANCE)
        return Relation(
            sql=f"SELECT * FROM {ended}",
            columns=node.columns,
            key=key,
            guard=_EACH_ADVANCE,
            sort=sort,
            windows=shown_windows(node, windows),
            is_final=True,
        )
    builder.do(f"DELETE FROM {state} WHERE {has_ended}", _EACH_ADVANCE)
    before = _shown(node, f"SELECT * FROM {old}", columns, windows, below)
    after = _shown(node, f"SELECT * FROM {merged}", columns, windows, below)
    return Relation(
        sql=differences(before, after),
        columns=node.columns,
        is_changelog=True,
        # Sessions of a key that are merged leave one whose start another had.
        key=key if "window_start" in windows.values() else None,
        sort=sort,
    )


def _of_rows(source: str, keys: list[tuple[str, str]], columns: Columns, gap: int) -> str:
    """Returns a SELECT of pieces of sessions that the rows of a micro-batch make: of rows in the same interval of the
    length of the gap, which are in one session. Pieces are few, and `_merged` looks for the gaps between them: a window
    function over all rows would cost more than their decoding."""
    terms = [f"{sql} AS {quoted(name)}" for name, sql in keys]
    shown = ", ".join([*terms, 'min("#e") AS "#t0"', 'max("#e") AS "#t1"', *columns.partials()])
    by = ", ".join([*(sql for _, sql in keys), aligned('"#e"', gap, 0)])
    return f"SELECT {shown} FROM ({source}) GROUP BY {by}"


def _merged(new: str, old: str, names: list[str], columns: Columns, gap: int) -> str:
    """Returns a SELECT of sessions that are no further apart than the gap, as one."""
    by = f"PARTITION BY {listed(names)} " if names else ""
    # New pieces before sessions of the state where both begin and end together: sums are always made in one order.
    order = 'ORDER BY "#t0", "#t1", "#s"'
    pieces = f'SELECT *, 0 AS "#s" FROM {new} UNION ALL SELECT *, 1 AS "#s" FROM {old}'
    reached = f'max("#t1") OVER ({by}{order} ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)'
    pieces = f'SELECT *, CASE WHEN "#t0" - {reached} <= {gap} THEN 0 ELSE 1 END AS "#b" FROM ({pieces})'
    pieces = f'SELECT *, sum("#b") OVER ({by}{order} ROWS UNBOUNDED PRECEDING) AS "#g" FROM ({pieces})'
    shown = ", ".join([*map(quoted, names), 'min("#t0") AS "#t0"', 'max("#t1") AS "#t1"', *columns.merged()])
    return f"SELECT {shown} FROM ({pieces}) GROUP BY {', '.join([*map(quoted, names), chr(34) + '#g' + chr(34)])}"


def _shown(node: Group, rows: str, columns: Columns, windows: dict[str, str], below: Below) -> str:
    gap, type_ = below.node.window.sizes["GAP"], below.node.time_type
    us = {"window_start": '"#t0"', "window_end": f'"#t1" + {gap}', "window_time": f'"#t1" + {gap - 1000}'}
    values = [f"{timestamp(us[of], type_)} AS {quoted(name)}" for name, of in windows.items()]
    names = [quoted(name) for name, _ in node.keys if name not in windows]
    items = ", ".join(f"{sql} AS {quoted(name)}" for name, sql in node.items)
    having = f" WHERE {node.having}" if node.having else ""
    return f"SELECT {items} FROM (SELECT {', '.join([*values, *names, *columns.values('')])} FROM ({rows})){having}"
