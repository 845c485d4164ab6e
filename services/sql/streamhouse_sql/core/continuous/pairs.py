"""Joins: what each side has kept for rows of the other that come later.

Invariants of the state: each side has the rows that may still meet a row to come. A row of an interval join goes when
the watermark has passed all times that it can meet; a version of a temporal join when a newer one is behind the
watermark; rows of other joins stay, or go when they are older than state_ttl.
"""

from __future__ import annotations

from collections.abc import Mapping

from shproto.errors import InvalidStatement

from streamhouse_sql.core.continuous.build import Builder, Relation, duration, listed, same
from streamhouse_sql.core.continuous.model import AFTER_US, NOW_US, OFFSET, PARTITION, WEIGHT, Expiry, Guard
from streamhouse_sql.core.continuous.nodes import Join
from streamhouse_sql.core.quoting import quoted

CHANGED = "#c"
AT = "#at"
# State that is over is looked for in steps of event time of at least this length.
PRUNE_US_MIN = 1_000_000
_EACH_ADVANCE = Guard(step_us=1, offset_us=0)


def pairs(builder: Builder, node: Join, left: Relation, right: Relation) -> Relation:
    """Returns the changes of the pairs of rows."""
    if node.as_of:
        return _as_of(builder, node, left, right)
    sides = (_renamed(left, _given(node, 0, left)), _renamed(right, _given(node, 1, right)))
    if _is_of_windows(node, *sides):
        return _of_windows(builder, node, *sides)
    if left.guard or right.guard:
        raise InvalidStatement(
            "a join of windows that have ended needs an equality of both sides' window_start or window_end",
            clause="JOIN",
        )
    is_changelog = left.is_changelog or right.is_changelog
    if node.interval is not None and is_changelog:
        raise InvalidStatement("an interval join of rows that may change is not supported", clause="JOIN")
    on = _on(node)
    shown = " and ".join(f"{one} = {other}" for one, other in node.keys)
    if node.interval is not None:
        least, greatest = node.interval
        between = f"between {_signed(least)} and {_signed(greatest)}"
        operator = f"interval join on {shown}, {node.times[1]} less {node.times[0]} {between}"
    else:
        operator = f"join on {shown}"
    builder.operators.append(operator)
    changes = [builder.kept(side) for side in sides]
    bound = "interval" if node.interval is not None else builder.ttl_bound()
    states = [
        builder.state(
            _kept_columns(builder, node, side, changes[at], at),
            operator=operator,
            holds=f"rows of the {('left', 'right')[at]} side",
            bound=bound,
        )
        for at, side in enumerate(sides)
    ]
    names = (*sides[0].columns, *sides[1].columns)
    columns = listed(names)
    weight = f", l.{quoted(WEIGHT)} * r.{quoted(WEIGHT)} AS {quoted(WEIGHT)}" if is_changelog else ""
    dl, dr = (_weighted(change, is_changelog) for change in changes)
    sl, sr = (_weighted_state(state, side, is_changelog) for state, side in zip(states, sides, strict=True))
    out = builder.new("d")
    # New rows of the left side meet all of the right, and old ones of the left the new ones of the right.
    met = (
        f"SELECT {columns}{weight} FROM ({dl}) AS l JOIN ({sr} UNION ALL {dr}) AS r ON {on} UNION ALL "
        f"SELECT {columns}{weight} FROM ({sl}) AS l JOIN ({dr}) AS r ON {on}"
    )
    if is_changelog:
        total = f"sum({quoted(WEIGHT)})::INTEGER"
        met = f'SELECT {columns}, {total} AS "#t" FROM ({met}) GROUP BY {columns} HAVING {total} <> 0'
        met = f'SELECT *, unnest(range(abs("#t"))) FROM ({met})'
        met = f'SELECT {columns}, sign("#t")::INTEGER AS {quoted(WEIGHT)} FROM ({met})'
    builder.make(out, met)
    for at, side in enumerate(sides):
        _keep(builder, node, side, changes[at], states[at], at)
    key = None
    if left.key is not None and right.key is not None:
        key = (*sides[0].key, *sides[1].key)  # type: ignore[misc]
    return Relation(sql=f"SELECT * FROM {out}", columns=names, is_changelog=is_changelog, key=key)


def _on(node: Join) -> str:
    keys = " AND ".join(f"{left} = {right}" for left, right in node.keys)
    return f"{keys} AND {node.where}" if node.where else keys


def _signed(length_us: int) -> str:
    return f"-{duration(-length_us)}" if length_us < 0 else duration(length_us)


def _given(node: Join, at: int, side: Relation) -> dict[str, str]:
    """Returns the names behind the join of a side's columns that are needed."""
    of = (node.left, node.right)[at]
    return {name: new for name, new in zip(of.columns, node.names[at], strict=True) if name in side.columns}


def _renamed(relation: Relation, given: Mapping[str, str]) -> Relation:
    shown = [f"{quoted(name)} AS {quoted(new)}" for name, new in given.items()]
    rest = [quoted(WEIGHT)] if relation.is_changelog else []
    return Relation(
        sql=f"SELECT {', '.join([*shown, *rest])} FROM ({relation.sql})",
        columns=tuple(given.values()),
        is_changelog=relation.is_changelog,
        key=tuple(given[name] for name in relation.key) if relation.key is not None else None,
        guard=relation.guard,
        windows={given[name]: of for name, of in relation.windows.items()},
    )


def _weighted(change: Relation, is_changelog: bool) -> str:
    if not is_changelog or change.is_changelog:
        return change.sql
    return f"SELECT *, 1 AS {quoted(WEIGHT)} FROM ({change.sql})"


def _weighted_state(state: str, side: Relation, is_changelog: bool) -> str:
    shown = listed(side.columns)
    if not is_changelog:
        return f"SELECT {shown} FROM {state}"
    if side.is_changelog and side.key is None:
        return f"SELECT {shown}, {quoted(WEIGHT)} FROM {state}"
    return f"SELECT {shown}, 1 AS {quoted(WEIGHT)} FROM {state}"


def _kept_columns(builder: Builder, node: Join, side: Relation, change: Relation, at: int) -> str:
    """Returns a SELECT of the rows of a side that are new in its state."""
    shown = [quoted(name) for name in side.columns]
    if side.is_changelog and side.key is None:
        shown.append(quoted(WEIGHT))
    if node.interval is not None:
        shown.append(f"epoch_us({quoted(node.times[at])}) AS {quoted(AT)}")
    elif builder.options.ttl_us:
        shown.append(f"{NOW_US}::BIGINT AS {quoted(CHANGED)}")
    # A row without a key, or without a time, meets none.
    known = [f"({keys[at]}) IS NOT NULL" for keys in node.keys]
    if node.interval is not None:
        known.append(f"{quoted(node.times[at])} IS NOT NULL")
    return f"SELECT {', '.join(shown)} FROM ({change.sql}) WHERE {' AND '.join(known)}"


def _keep(builder: Builder, node: Join, side: Relation, change: Relation, state: str, at: int) -> None:
    rows = _kept_columns(builder, node, side, change, at)
    weight = quoted(WEIGHT)
    if side.is_changelog and side.key is not None:
        gone = f"SELECT 1 FROM ({change.sql}) AS d WHERE d.{weight} < 0 AND {same('s', 'd', side.key)}"
        builder.do(f"DELETE FROM {state} AS s WHERE EXISTS ({gone})")
        rows = f"{rows} AND {weight} > 0"
    elif side.is_changelog:
        if builder.options.ttl_us:
            raise InvalidStatement(
                "state_ttl needs a key of both sides of a join whose rows may change", clause="state_ttl"
            )
        shown = listed(side.columns)
        total = f"sum({weight})::INTEGER"
        builder.compactions.append(
            (state, f"SELECT {shown}, {total} AS {weight} FROM {state} GROUP BY {shown} HAVING {total} <> 0")
        )
    builder.do(f"INSERT INTO {state} {rows}")
    if node.interval is not None:
        least, greatest = node.interval
        # A row of the left meets rows of the right up to `greatest` later, one of the right those of the left up to
        # `least` earlier.
        reach = greatest if at == 0 else -least
        guard = Guard(step_us=max(PRUNE_US_MIN, (greatest - least) // 8), offset_us=0)
        builder.do(f"DELETE FROM {state} WHERE {quoted(AT)} + ({reach}) < {AFTER_US}", guard)
    elif builder.options.ttl_us:
        builder.expiries.append(Expiry(table=state, column=quoted(CHANGED), ttl_us=builder.options.ttl_us))


# ---- windows that have ended


def _is_of_windows(node: Join, left: Relation, right: Relation) -> bool:
    """True if both sides' rows come when their window ends, and only those of one window meet."""
    if left.guard is None or left.guard != right.guard:
        return False
    windows = [({quoted(name): of for name, of in side.windows.items()}) for side in (left, right)]
    return any(one in windows[0] and windows[0][one] == windows[1].get(other) for one, other in node.keys)


def _of_windows(builder: Builder, node: Join, left: Relation, right: Relation) -> Relation:
    builder.operators.append("join of windows, when they end")
    changes = [builder.kept(side) for side in (left, right)]
    names = (*left.columns, *right.columns)
    return Relation(
        sql=f"SELECT {listed(names)} FROM ({changes[0].sql}) AS l JOIN ({changes[1].sql}) AS r ON {_on(node)}",
        columns=names,
        guard=left.guard,
        is_final=True,
        windows={**left.windows, **right.windows},
    )


# ---- the version of a row at a time


def _as_of(builder: Builder, node: Join, left: Relation, right: Relation) -> Relation:
    """Returns the rows of the left side with the version of the right that held at their time, once no earlier version
    can come any more."""
    if left.is_changelog or right.is_changelog:
        raise InvalidStatement(
            "FOR SYSTEM_TIME AS OF over rows that may change is not supported", clause="FOR SYSTEM_TIME AS OF"
        )
    operator = f"temporal join on {' and '.join(f'{one} = {other}' for one, other in node.keys)}"
    builder.operators.append(operator)
    sides = []
    shown_columns: list[str] = []
    for at, side in enumerate((left, right)):
        given = _given(node, at, side)
        shown_columns += given.values()
        shown = [f"{quoted(name)} AS {quoted(new)}" for name, new in given.items()]
        inner = f"SELECT {', '.join([*shown, *map(quoted, side.hidden)])} FROM ({side.sql})"
        keys = [f"{keys[at]} AS {quoted(f'#j{number}')}" for number, keys in enumerate(node.keys)]
        time = f"epoch_us({quoted(node.times[at])}) AS {quoted(AT)}"
        place = [quoted(name) for name in (PARTITION, OFFSET) if name in side.hidden]
        sides.append(f"SELECT {', '.join([*map(quoted, given.values()), *keys, time, *place])} FROM ({inner})")
    joins = [f"#j{number}" for number in range(len(node.keys))]
    stream, versions = sides
    known = " AND ".join(f"{quoted(name)} IS NOT NULL" for name in [*joins, AT])
    versions = f"SELECT * FROM ({versions}) WHERE {known}"
    waiting = builder.state(stream, operator=operator, holds="rows that wait for the watermark", bound="watermark")
    kept = builder.state(
        versions,
        operator=operator,
        holds="the versions of each key that may be asked for",
        bound="watermark, but for the newest of each key",
    )
    builder.do(f"INSERT INTO {waiting} {stream}")
    builder.do(f"INSERT INTO {kept} {versions}")
    moment = quoted(AT)
    is_ready = f"({moment} IS NULL OR {moment} < {AFTER_US})"
    newest_first = f"{quoted(PARTITION)} DESC, {quoted(OFFSET)} DESC"
    last = f"row_number() OVER (PARTITION BY {listed([*joins, AT])} ORDER BY {newest_first})"
    asked = f"SELECT v.* FROM {kept} AS v SEMI JOIN {waiting} AS w ON {same('v', 'w', joins)}"
    on = " AND ".join(f"l.{quoted(name)} = r.{quoted(name)}" for name in joins)
    out = builder.new("d")
    kind = "ASOF LEFT JOIN" if node.is_outer else "ASOF JOIN"
    builder.make(
        out,
        f"SELECT {listed(shown_columns)} FROM (SELECT * FROM {waiting} WHERE {is_ready}) AS l "
        f"{kind} (SELECT * FROM ({asked}) QUALIFY {last} = 1) AS r ON {on} AND l.{moment} >= r.{moment}",
        _EACH_ADVANCE,
    )
    builder.do(f"DELETE FROM {waiting} WHERE {is_ready}", _EACH_ADVANCE)
    past = f"FROM {kept} WHERE {moment} < {AFTER_US} GROUP BY {listed(joins)}"
    newest = f'SELECT {listed(joins)}, max({moment}) AS "#m" {past}'
    builder.do(
        f'DELETE FROM {kept} AS v USING ({newest}) AS q WHERE {same("v", "q", joins)} AND v.{moment} < q."#m"',
        Guard(step_us=PRUNE_US_MIN, offset_us=0),
    )
    return Relation(sql=f"SELECT * FROM {out}", columns=tuple(shown_columns), guard=_EACH_ADVANCE)
