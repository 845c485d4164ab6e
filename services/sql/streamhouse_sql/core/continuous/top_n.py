"""Top-n: the first rows of each partition, by ROW_NUMBER.

Invariants of the state: over rows that are only ever added it has the first n rows of each partition, and no others,
with their numbers; over a changelog, all rows of the partition with their weights, since a row that is taken away makes
room for the next. Rows that ORDER BY does not tell apart are in the order of input, partition and offset, or of all of
their columns where they have no place in the log.
"""

from __future__ import annotations

from shproto.errors import InvalidStatement

from streamhouse_sql.core.continuous.build import Builder, Relation, differences, listed, same
from streamhouse_sql.core.continuous.model import AFTER_US, INPUT, NOW_US, OFFSET, PARTITION, WEIGHT, Expiry
from streamhouse_sql.core.continuous.nodes import TopN
from streamhouse_sql.core.quoting import quoted

RANK = "#number"
CHANGED = "#c"
_PLACE = (INPUT, PARTITION, OFFSET)


def top_n(builder: Builder, node: TopN, source: Relation, window_end: str = "") -> Relation:
    """Returns the changes of the first rows of each partition. `window_end`: expression of the end in us of the window
    that a partition is of, empty without."""
    keys = [f"#k{at}" for at in range(len(node.partition))]
    terms = ", ".join(node.order)
    if _is_of_window(node, source):
        builder.operators.append(f"first {node.limit} by {terms} of each window, when it ends")
        number = f"{node.function}() OVER ({_by(list(node.partition))}ORDER BY {_total(node, source)})"
        if node.function != "row_number":
            number = f"{node.function}() OVER ({_by(list(node.partition))}ORDER BY {terms})"
        return _shown(
            node, source, f"SELECT *, {number} AS {quoted(RANK)} FROM ({source.sql}) QUALIFY {number} <= {node.limit}"
        )
    if node.function != "row_number":
        raise InvalidStatement(
            f"{node.function}() is supported over windows that have ended; row_number() is everywhere",
            clause=node.function,
        )
    operator = f"first {node.limit} by {terms} for each {', '.join(node.partition) or 'row'}"
    builder.operators.append(operator)
    columns = [*source.columns, *(name for name in _PLACE if name in source.hidden)]
    parts = ", ".join(f"{sql} AS {quoted(key)}" for sql, key in zip(node.partition, keys, strict=True))
    rows = f"SELECT {listed(columns)}{', ' + parts if parts else ''} FROM ({source.sql})"
    columns = [*columns, *keys]
    bound = "window" if window_end else builder.ttl_bound()
    make = _over_changelog if source.is_changelog else _over_rows
    old, new, state = make(builder, node, source, rows, columns, keys, operator, bound)
    if builder.options.ttl_us:
        builder.expiries.append(Expiry(table=state, column=quoted(CHANGED), ttl_us=builder.options.ttl_us))
    if window_end:
        builder.do(f"DELETE FROM {state} WHERE {window_end} <= {AFTER_US}")
    shown = [*source.columns, *([RANK] if node.rank else [])]
    before, after = (f"SELECT {listed(shown)} FROM {table}" for table in (old, new))
    weight = quoted(WEIGHT)
    renamed = [f"{quoted(RANK)} AS {quoted(node.rank)}"] if node.rank else []
    names = {quoted(name) for name in source.columns}
    key: tuple[str, ...] | None = None
    if all(sql in names for sql in node.partition) and (node.limit == 1 or node.rank):
        key = tuple(sql[1:-1].replace('""', '"') for sql in node.partition)
        key = (*key, node.rank) if node.limit > 1 else key
    return Relation(
        sql=f"SELECT {', '.join([*map(quoted, source.columns), *renamed, weight])} FROM ({differences(before, after)})",
        columns=node.columns,
        is_changelog=True,
        key=key,
        sort=key or (),
    )


def _over_rows(
    builder: Builder,
    node: TopN,
    source: Relation,
    rows: str,
    columns: list[str],
    keys: list[str],
    operator: str,
    bound: str,
) -> tuple[str, str, str]:
    """Returns tables of the first rows before and after, of the partitions with new rows, and the state."""
    number = f"row_number() OVER ({_by([quoted(key) for key in keys])}ORDER BY {_total(node, source)})"
    changed = f", {NOW_US}::BIGINT AS {quoted(CHANGED)}" if builder.options.ttl_us else ""
    best = builder.new("d")
    builder.make(best, f"SELECT * FROM ({rows}) QUALIFY {number} <= {node.limit}")
    state = builder.state(
        f"SELECT *, 0::BIGINT AS {quoted(RANK)}{changed} FROM {best}",
        operator=operator,
        holds=f"{node.limit} rows for each key",
        bound=bound,
    )
    old, new = builder.new("d"), builder.new("d")
    builder.make(old, f"SELECT s.* FROM {state} AS s SEMI JOIN {best} AS b ON {same('s', 'b', keys)}")
    both = f"SELECT {listed(columns)} FROM {old} UNION ALL SELECT {listed(columns)} FROM {best}"
    builder.make(
        new,
        f"SELECT {listed(columns)}, {number} AS {quoted(RANK)}{changed} FROM ({both}) QUALIFY {number} <= {node.limit}",
    )
    builder.do(f"DELETE FROM {state} AS s WHERE EXISTS (SELECT 1 FROM {best} AS b WHERE {same('s', 'b', keys)})")
    builder.do(f"INSERT INTO {state} SELECT * FROM {new}")
    return old, new, state


def _over_changelog(
    builder: Builder,
    node: TopN,
    source: Relation,
    rows: str,
    columns: list[str],
    keys: list[str],
    operator: str,
    bound: str,
) -> tuple[str, str, str]:
    weight = quoted(WEIGHT)
    rows = rows.replace("SELECT ", f"SELECT {weight}, ", 1)
    change = builder.new("d")
    builder.make(change, rows)
    changed = f", {NOW_US}::BIGINT AS {quoted(CHANGED)}" if builder.options.ttl_us else ""
    shown = listed(columns)
    state = builder.state(
        f"SELECT {shown}, 1::BIGINT AS {weight}{changed} FROM {change}",
        operator=operator,
        holds="all rows, since those that are taken away make room for others",
        bound=bound,
    )
    whole, together = builder.new("d"), builder.new("d")
    builder.make(whole, f"SELECT s.* FROM {state} AS s SEMI JOIN {change} AS c ON {same('s', 'c', keys)}")
    both = f"SELECT {shown}, {weight} FROM {whole} UNION ALL SELECT {shown}, {weight} FROM {change}"
    total = f"sum({weight})::BIGINT"
    builder.make(
        together, f"SELECT {shown}, {total} AS {weight}{changed} FROM ({both}) GROUP BY {shown} HAVING {total} > 0"
    )
    number = f"row_number() OVER ({_by([quoted(key) for key in keys])}ORDER BY {_total(node, source)})"
    tops = []
    for table in (whole, together):
        top = builder.new("d")
        each = f"SELECT {shown} FROM (SELECT *, unnest(range({weight})) FROM {table})"
        builder.make(top, f"SELECT *, {number} AS {quoted(RANK)} FROM ({each}) QUALIFY {number} <= {node.limit}")
        tops.append(top)
    builder.do(f"DELETE FROM {state} AS s WHERE EXISTS (SELECT 1 FROM {change} AS c WHERE {same('s', 'c', keys)})")
    builder.do(f"INSERT INTO {state} SELECT * FROM {together}")
    return tops[0], tops[1], state


def _is_of_window(node: TopN, source: Relation) -> bool:
    """True if all rows of a partition are of a window that has ended, and come in one micro-batch."""
    return bool(source.guard) and any(quoted(name) in node.partition for name in source.windows)


def _shown(node: TopN, source: Relation, sql: str) -> Relation:
    number = [f"{quoted(RANK)} AS {quoted(node.rank)}"] if node.rank else []
    return Relation(
        sql=f"SELECT {', '.join([*map(quoted, source.columns), *number])} FROM ({sql})",
        columns=node.columns,
        key=source.key,
        guard=source.guard,
        sort=source.sort,
        windows=source.windows,
        is_final=True,
    )


def _by(partition: list[str]) -> str:
    return f"PARTITION BY {', '.join(partition)} " if partition else ""


def _total(node: TopN, source: Relation) -> str:
    """Returns terms of ORDER BY that tell all rows apart."""
    place = [name for name in _PLACE if name in source.hidden]
    rest = () if source.has_places else source.columns
    return ", ".join([*node.order, *map(quoted, [*place, *rest])])
