"""GROUP BY: aggregates that are kept up to date, and those of windows that are given out when these end.

Invariants of a group's state: one row per key, or per key and slice until it is merged; `#n` is the number of rows the
group has, and a group without rows has no state. The state of a window that has ended is gone, as no row that is not
late can be in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from shproto.errors import InvalidStatement

from streamhouse_sql.core.continuous.aggregates import (
    Aggregate,
    Part,
    final_of,
    parts_of,
    weighted_final_of,
    weighted_parts_of,
)
from streamhouse_sql.core.continuous.build import Builder, Relation, listed, same
from streamhouse_sql.core.continuous.distinct import CountedValues, DistinctSets
from streamhouse_sql.core.continuous.event_time import Below, aligned, guard_of, step_of, timestamp
from streamhouse_sql.core.continuous.model import AFTER_US, BEFORE_US, NOW_US, WEIGHT, Expiry
from streamhouse_sql.core.continuous.nodes import Group
from streamhouse_sql.core.quoting import quoted

ROWS = "#n"
CHANGED = "#c"


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns of a group's state: names of keys, and the parts of each aggregate with theirs."""

    keys: tuple[str, ...]
    parts: tuple[tuple[str, Part], ...]
    finals: tuple[tuple[str, Callable[[str], str]], ...]

    def partials(self) -> list[str]:
        """Returns the terms that compute the parts over rows."""
        return [f"{part.partial} AS {quoted(name)}" for name, part in self.parts]

    def merged(self) -> list[str]:
        """Returns the terms that merge the parts of several rows."""
        return [f"{part.merge.format(quoted(name))} AS {quoted(name)}" for name, part in self.parts]

    def values(self, prefix: str) -> list[str]:
        """Returns the terms of the aggregates' values; the parts have the prefix before their names."""
        return [f"{final(prefix)} AS {quoted(name)}" for name, final in self.finals]


# Counted with the set of distinct values; over rows there is nothing to compute.
_DISTINCT = Part("NULL::BIGINT", "sum({})::BIGINT", "coalesce({o}, 0) + coalesce({p}, 0)")


def columns_of(node: Group, *, weighted: bool) -> Columns:
    """Returns the columns of the node's state. Raises InvalidStatement for an aggregate that cannot be kept."""
    parts: list[tuple[str, Part]] = []
    finals: list[tuple[str, Callable[[str], str]]] = []
    for name, call in node.aggregates:
        if call.distinct and not weighted:
            found: Sequence[Part] = [_DISTINCT]
        else:
            found = weighted_parts_of(call) if weighted else parts_of(call)
        names = [f"{name}p{at}" for at in range(len(found))]
        parts += zip(names, found, strict=True)
        finals.append((name, _final(call, names, weighted=weighted)))
    rows = f'sum("{WEIGHT}")::BIGINT' if weighted else "count(*)::BIGINT"
    parts.append((ROWS, Part(rows, "sum({})::BIGINT", "coalesce({o}, 0) + coalesce({p}, 0)")))
    return Columns(tuple(name for name, _ in node.keys), tuple(parts), tuple(finals))


def _final(call: Aggregate, names: Sequence[str], *, weighted: bool) -> Callable[[str], str]:
    def final(prefix: str) -> str:
        columns = [quoted(f"{prefix}{name}") for name in names]
        if call.distinct:
            return f"coalesce({columns[0]}, 0)"
        return weighted_final_of(call, columns) if weighted else final_of(call, columns)

    return final


def grouped(
    builder: Builder, node: Group, source: Relation, below: Below | None, *, keeps_windows: bool
) -> tuple[Relation, str]:
    """Returns the changes of the groups, and a SELECT of all of them. A change of a group takes its old row away, and
    adds the new one.

    `below`: the windows that the rows are in. `keeps_windows`: groups of windows that have ended stay, since they are
    the result.
    """
    weighted = source.is_changelog
    distinct = [call for _, call in node.aggregates if call.distinct]
    if distinct and not weighted:
        source = builder.kept(source)
    windows = _window_keys(node, below)
    bound = _bound(builder, windows, keeps_windows)
    holds = "a row for each window and key" if windows else "a row for each group" if node.keys else "a row"
    operator = _shown(node)
    builder.operators.append(operator)
    sets = None
    if distinct and not weighted:
        sets = DistinctSets(builder, node.keys, distinct, bound=bound, operator=operator)
    counted = None
    if weighted and any(call.needs_values for _, call in node.aggregates):
        source = builder.kept(source)
        counted = CountedValues(builder, node.keys, node, bound=bound, operator=operator)
    columns = columns_of(node, weighted=weighted)
    changed = [f"{NOW_US}::BIGINT AS {quoted(CHANGED)}"] if builder.options.ttl_us else []
    keys = [f"{sql} AS {quoted(name)}" for name, sql in node.keys]
    # Without keys there is a row over no rows, too. Rows that replace others have weights whose sum is 0.
    by = f" GROUP BY {', '.join(str(at) for at in range(1, len(keys) + 1))}" if keys else " HAVING count(*) > 0"
    partial = f"SELECT {', '.join([*keys, *columns.partials()])} FROM ({source.sql}){by}"
    if sets is not None:
        partial = sets.joined(source.sql, partial, node)
    if counted is not None:
        partial = counted.joined(source.sql, partial)
    names = [*columns.keys, *(name for name, _ in columns.parts)]
    state = builder.state(
        f"SELECT {listed(names)}{''.join(', ' + c for c in changed)} FROM ({partial})",
        operator=operator,
        holds=holds,
        bound=bound,
    )
    both = [
        f"{part.both.format(o='s.' + quoted(name), p='p.' + quoted(name))} AS {quoted('n' + name)}, "
        f"s.{quoted(name)} AS {quoted('o' + name)}"
        for name, part in columns.parts
    ]
    change = builder.new("d")
    terms = [*(f"p.{quoted(name)}" for name in columns.keys), *both, *changed]
    builder.make(
        change,
        f"SELECT {', '.join(terms)} FROM ({partial}) AS p LEFT JOIN {state} AS s ON {same('p', 's', columns.keys)}",
    )
    _merge(builder, state, change, columns)
    values = [table for tables in (sets, counted) if tables is not None for table in tables.tables]
    if builder.options.ttl_us:
        # Values of groups that were forgotten are forgotten, too.
        there = f"SELECT 1 FROM {state} AS s WHERE {same('s', 't', columns.keys)}"
        follow = tuple(f"DELETE FROM {table} AS t WHERE NOT EXISTS ({there})" for table in values)
        builder.expiries.append(
            Expiry(table=state, column=quoted(CHANGED), ttl_us=builder.options.ttl_us, follow=follow)
        )
    if windows and not keeps_windows:
        guard = guard_of(below.node.window) if below is not None else None
        for table in (state, *values):
            builder.do(f"DELETE FROM {table} WHERE {_end_of(windows, below)} <= {AFTER_US}", guard)
    return _changes(node, columns, change, windows), result_of(node, columns, state)


def _shown(node: Group) -> str:
    keys = ", ".join(sql for _, sql in node.keys) or "all rows"
    return f"aggregate by {keys}"


def _bound(builder: Builder, windows: dict[str, str], keeps_windows: bool) -> str:
    if windows and not keeps_windows:
        return "window"
    return builder.ttl_bound()


def _merge(builder: Builder, state: str, change: str, columns: Columns) -> None:
    """Puts the groups as they are now in the place of those that were. Not by MERGE or UPDATE: DuckDB updates rows in
    random order in a time that grows with their square (10,000 groups of 13 columns: 850 ms against 12)."""
    builder.do(f"DELETE FROM {state} AS s USING {change} AS d WHERE {same('s', 'd', columns.keys)}")
    values = [
        *(quoted(name) for name in columns.keys),
        *(quoted("n" + name) for name, _ in columns.parts),
        *([quoted(CHANGED)] if builder.options.ttl_us else []),
    ]
    builder.do(f"INSERT INTO {state} SELECT {', '.join(values)} FROM {change} WHERE {quoted('n' + ROWS)} > 0")


def _changes(node: Group, columns: Columns, change: str, windows: dict[str, str]) -> Relation:
    """Returns the old rows of the groups that changed, and the new ones."""
    old, new = quoted("o" + ROWS), quoted("n" + ROWS)
    differs = " OR ".join(
        [
            f"{old} IS NULL",
            f"{new} <= 0",
            *(f"{final('o')} IS DISTINCT FROM {final('n')}" for _, final in columns.finals),
        ]
    )
    sides = []
    for prefix, weight, alive in (("o", -1, f"{old} IS NOT NULL"), ("n", 1, f"{new} > 0")):
        inner = ", ".join([*map(quoted, columns.keys), *columns.values(prefix)]) or "1 AS one"
        items = ", ".join([*(f"{sql} AS {quoted(name)}" for name, sql in node.items), f"{weight} AS {quoted(WEIGHT)}"])
        having = f" WHERE {node.having}" if node.having else ""
        sides.append(f"SELECT {items} FROM (SELECT {inner} FROM {change} WHERE {alive} AND ({differs})){having}")
    key, sort = key_of(node, windows)
    return Relation(sql=" UNION ALL ".join(sides), columns=node.columns, is_changelog=True, key=key, sort=sort)


def result_of(node: Group, columns: Columns, state: str) -> str:
    """Returns a SELECT of all rows of the groups, from their state."""
    inner = ", ".join([*map(quoted, columns.keys), *columns.values("")]) or "1 AS one"
    items = ", ".join(f"{sql} AS {quoted(name)}" for name, sql in node.items)
    having = f" WHERE {node.having}" if node.having else ""
    return f"SELECT {items} FROM (SELECT {inner} FROM {state}){having}"


def key_of(node: Group, windows: dict[str, str]) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """Returns the columns that identify a row of the result, None if not all keys are shown, and the order of rows:
    windows first."""
    shown = {sql: name for name, sql in reversed(node.items)}
    names = [(name, shown[quoted(name)]) for name, _ in node.keys if quoted(name) in shown]
    sort = [item for name, item in names if name in windows] + [item for name, item in names if name not in windows]
    return (tuple(item for _, item in names) if len(names) == len(node.keys) else None), tuple(sort)


# ---- windows


def _window_keys(node: Group, below: Below | None) -> dict[str, str]:
    """Returns the window's names of the keys that are columns of it, by the key's name; empty unless they tell a window
    from all others."""
    if below is None:
        return {}
    found = {name: below.names[sql[1:-1]] for name, sql in node.keys if sql[1:-1] in below.names and sql[0] == '"'}
    function = below.node.window.function
    needed = {"window_end", "window_time"} if function == "CUMULATE" else {"window_start", "window_end", "window_time"}
    return found if needed & set(found.values()) else {}


def _end_of(windows: dict[str, str], below: Below | None) -> str:
    """Returns SQL of a window's end in us, from the keys of a state."""
    assert below is not None
    for name, of in windows.items():
        if of == "window_end":
            return f"epoch_us({quoted(name)})"
        if of == "window_time":
            return f"epoch_us({quoted(name)}) + 1000"
    name = next(iter(windows))
    return f"epoch_us({quoted(name)}) + {below.node.window.sizes['SIZE']}"


@dataclass(frozen=True, slots=True)
class Slices:
    """State of windows that have not ended. `columns`: (name, SQL over rows) of the state, in us; `ends`:
    SELECT of a table's rows with `#end`, once for each window that has them; `over`: condition that no window that may
    still come has a row."""

    columns: tuple[tuple[str, str], ...]
    ends: str
    over: str


def slices_of(below: Below, is_sliced: bool) -> Slices:
    """Returns how rows are kept: per slice, of which a window has several, or per window that a row is in."""
    window = below.node.window
    size, step, offset = window.sizes["SIZE"], step_of(window), window.sizes.get("OFFSET", 0)
    if not is_sliced:
        return Slices(
            (("#start", '"#start"'), ("#end", '"#end"')),
            f'SELECT * FROM {{}} WHERE "#end" <= {AFTER_US}',
            f'"#end" <= {AFTER_US}',
        )
    last = (
        f'"#slice" + {size}'
        if window.function == "HOP"
        else f"{aligned(chr(34) + '#slice' + chr(34), size, offset)} + {size}"
    )
    start = f'"#end" - {size}' if window.function == "HOP" else aligned('"#slice"', size, offset)
    return Slices(
        (("#slice", '"#slice"'),),
        f'SELECT *, {start} AS "#start" FROM (SELECT *, unnest(range("#slice" + {step}, {last} + 1, {step})) AS "#end" '
        f'FROM {{}} WHERE "#slice" < {AFTER_US}) WHERE "#end" > {BEFORE_US} AND "#end" <= {AFTER_US}',
        f"{last} <= {AFTER_US}",
    )


def closed(builder: Builder, node: Group, source: Relation, below: Below, *, is_sliced: bool) -> Relation:
    """Returns the groups of windows that have ended in this micro-batch, each once."""
    windows = _window_keys(node, below)
    if not windows:
        raise InvalidStatement(
            "EMIT ON WINDOW CLOSE needs window_start and window_end in GROUP BY", clause="EMIT ON WINDOW CLOSE"
        )
    guard = guard_of(below.node.window)
    slices = slices_of(below, is_sliced)
    operator = f"{_shown(node)}, given out when the window of {below.node.window.function} ends"
    builder.operators.append(operator)
    keys = [(name, sql) for name, sql in node.keys if name not in windows]
    distinct = [call for _, call in node.aggregates if call.distinct]
    sets = None
    if distinct:
        source = builder.kept(source)
        sets = DistinctSets(builder, (*slices.columns, *keys), distinct, bound="window", operator=operator)
    columns = columns_of(node, weighted=False)
    at = [name for name, _ in slices.columns]
    names = [name for name, _ in keys]
    terms = [f"{sql} AS {quoted(name)}" for name, sql in (*slices.columns, *keys)]
    by = ", ".join(str(place) for place in range(1, len(terms) + 1))
    counted = {part for part, _, _ in sets.places(node)} if sets is not None else set()
    plain = [part for part in columns.parts if part[0] not in counted]
    partials = [f"{part.partial} AS {quoted(name)}" for name, part in plain]
    partial = f"SELECT {', '.join([*terms, *partials])} FROM ({source.sql}) GROUP BY {by}"
    state = builder.state(partial, operator=operator, holds="partial results for each slice and key", bound="window")
    builder.do(f"INSERT INTO {state} {partial}")
    merged = [f"{part.merge.format(quoted(name))} AS {quoted(name)}" for name, part in plain]
    slice_by = ", ".join(str(place) for place in range(1, len(at) + len(names) + 1))
    builder.compactions.append(
        (
            state,
            f"SELECT {', '.join([*map(quoted, at), *map(quoted, names), *merged])} FROM {state} GROUP BY {slice_by}",
        )
    )
    window = ["#start", "#end", *names]
    ended = (
        f"SELECT {', '.join([*map(quoted, window), *merged])} FROM ({slices.ends.format(state)}) "
        f"GROUP BY {', '.join(str(place) for place in range(1, len(window) + 1))}"
    )
    if sets is not None:
        sets.insert(source.sql)
        ended = sets.counted(ended, window, slices.ends, node)
    shown = _shown_windows(windows, below)
    values = ", ".join([*shown, *map(quoted, names), *columns.values("")])
    # The keys of the window have the names that the items know them by.
    items = ", ".join(f"{sql} AS {quoted(name)}" for name, sql in node.items)
    having = f" WHERE {node.having}" if node.having else ""
    change = builder.new("d")
    builder.make(change, f"SELECT {items} FROM (SELECT {values} FROM ({ended})){having}", guard)
    for table in (state, *(sets.tables if sets is not None else ())):
        builder.do(f"DELETE FROM {table} WHERE {slices.over}", guard)
    key, sort = key_of(node, windows)
    return Relation(
        sql=f"SELECT * FROM {change}",
        columns=node.columns,
        key=key,
        guard=guard,
        sort=sort,
        windows=shown_windows(node, windows),
        is_final=True,
    )


def shown_windows(node: Group, windows: Mapping[str, str]) -> dict[str, str]:
    """Returns the window's names of the columns that show keys of the window."""
    return {name: windows[sql[1:-1]] for name, sql in node.items if sql[1:-1] in windows and sql[0] == '"'}


def at_once(builder: Builder, node: Group, source: Relation) -> Relation:
    """Returns the groups of rows of windows that have ended, all of which come in one micro-batch."""
    windows = {name: source.windows[sql[1:-1]] for name, sql in node.keys if sql[1:-1] in source.windows}
    if not windows:
        raise InvalidStatement(
            "GROUP BY over windows that have ended needs a column of the window", clause="EMIT ON WINDOW CLOSE"
        )
    builder.operators.append(f"{_shown(node)} of each window, when it ends")
    keys = [f"{sql} AS {quoted(name)}" for name, sql in node.keys]
    columns = columns_of(node, weighted=False)
    partials = []
    for name, part in columns.parts:
        call = next((call for own, call in node.aggregates if call.distinct and name == f"{own}p0"), None)
        where = f" FILTER (WHERE {call.where})" if call is not None and call.where else ""
        partial = part.partial if call is None else f"count(DISTINCT {call.arguments[0]}){where}"
        partials.append(f"{partial} AS {quoted(name)}")
    by = ", ".join(str(at) for at in range(1, len(keys) + 1))
    rows = f"SELECT {', '.join([*keys, *partials])} FROM ({source.sql}) GROUP BY {by}"
    inner = ", ".join([*map(quoted, columns.keys), *columns.values("")])
    items = ", ".join(f"{sql} AS {quoted(name)}" for name, sql in node.items)
    having = f" WHERE {node.having}" if node.having else ""
    key, sort = key_of(node, windows)
    return Relation(
        sql=f"SELECT {items} FROM (SELECT {inner} FROM ({rows})){having}",
        columns=node.columns,
        key=key,
        guard=source.guard,
        sort=sort,
        windows=shown_windows(node, windows),
        is_final=True,
    )


def _shown_windows(windows: dict[str, str], below: Below) -> list[str]:
    us = {"window_start": '"#start"', "window_end": '"#end"', "window_time": '"#end" - 1000'}
    return [f"{timestamp(us[of], below.node.time_type)} AS {quoted(name)}" for name, of in windows.items()]
