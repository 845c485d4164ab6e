"""JOIN of a continuous query to a node: which columns are equal, and which times bound its state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from shproto.errors import InvalidStatement
from sqlglot import exp

from streamhouse_sql.core.continuous.names import Scope, conjuncts, resolved, written
from streamhouse_sql.core.continuous.nodes import Join, Node
from streamhouse_sql.core.dialect import Verbatim
from streamhouse_sql.core.quoting import quoted
from streamhouse_sql.core.windows import microseconds

Tables = list[tuple[str, Mapping[str, str]]]
_FLIPPED: Mapping[type[exp.Expr], type[exp.Expr]] = {
    exp.GT: exp.LT,
    exp.GTE: exp.LTE,
    exp.LT: exp.GT,
    exp.LTE: exp.GTE,
    exp.EQ: exp.EQ,
}


def joined(
    left: Node,
    tables: Tables,
    join: exp.Join,
    alias: str,
    right: Node,
    times: tuple[tuple[str, str] | None, tuple[str, str] | None],
) -> tuple[Join, Tables]:
    """Returns the join of the sources, and the columns of all its tables. `times`: name and type of the event time of
    each side. Raises InvalidStatement for a join that is not supported."""
    kind = " ".join(filter(None, (join.method, join.side, join.kind))).upper()
    version = join.this.args.get("version") if isinstance(join.this, exp.Table) else None
    allowed = {"", "INNER", "LEFT", "LEFT OUTER"} if version is not None else {"", "INNER"}
    if kind not in allowed:
        raise InvalidStatement(
            f"{kind} JOIN is not supported in a continuous query; JOIN … ON is"
            + (", and LEFT JOIN … FOR SYSTEM_TIME AS OF" if "LEFT" in kind else ""),
            clause=f"{kind} JOIN",
        )
    if join.args.get("using"):
        raise InvalidStatement("USING is not supported in a continuous query: write ON", clause="USING")
    on = join.args.get("on")
    if on is None:
        raise InvalidStatement("a join needs ON with an equality of both sides' columns", clause="JOIN")
    left_names = _names(left, tables)
    right_names = {name: f"{alias}.{name}" for name in right.columns}
    if any(name == alias.lower() for name, _ in ((table.lower(), columns) for table, columns in tables)) or not alias:
        raise InvalidStatement(f"both sides of a join need names of their own: … AS name; found {alias!r}", clause="AS")
    # Behind a join the columns have the names of their tables before theirs: both sides may have the same.
    both: Tables = [(table, {low: left_names[inner] for low, inner in columns.items()}) for table, columns in tables]
    both.append((alias, {name.lower(): inner for name, inner in right_names.items()}))
    scope = Scope(both)
    sides = (set(left_names.values()), set(right_names.values()))
    keys: list[tuple[str, str]] = []
    rest: list[str] = []
    least: int | None = None
    greatest: int | None = None
    inner_times = (
        left_names[times[0][0]] if times[0] is not None else "",
        right_names[times[1][0]] if times[1] is not None else "",
    )
    for part in conjuncts(on):
        condition = resolved(part, scope)
        pair = _equality(condition, sides)
        if pair is not None:
            keys.append(pair)
            continue
        rest.append(written(condition))
        for low, high in _bounds(condition, inner_times):
            least = low if least is None or (low is not None and low > least) else least
            greatest = high if greatest is None or (high is not None and high < greatest) else greatest
    if not keys:
        raise InvalidStatement(
            f"ON {on.sql(Verbatim)[:80]} has no equality of both sides' columns, which a join needs", clause="ON"
        )
    as_of = ""
    if version is not None:
        as_of = _as_of(version, scope, inner_times, rest)
    node = Join(
        left=left,
        right=right,
        keys=tuple(keys),
        where=" AND ".join(f"({condition})" for condition in rest),
        names=(tuple(left_names[name] for name in left.columns), tuple(right_names.values())),
        interval=(least, greatest) if least is not None and greatest is not None and version is None else None,
        times=inner_times,
        as_of=as_of,
        is_outer="LEFT" in kind,
    )
    return node, both


def _names(node: Node, tables: Tables) -> dict[str, str]:
    """Returns the names behind the join of the left side's columns."""
    if len(tables) > 1:
        return {name: name for name in node.columns}
    return {name: f"{tables[0][0]}.{name}" for name in node.columns}


def _equality(condition: exp.Expr, sides: tuple[set[str], set[str]]) -> tuple[str, str] | None:
    """Returns (left, right) expressions that a condition says are equal, None for another condition."""
    if not isinstance(condition, exp.EQ):
        return None
    first, second = condition.args["this"], condition.args["expression"]
    for one, other in ((first, second), (second, first)):
        if _is_of(one, sides[0]) and _is_of(other, sides[1]):
            return written(one), written(other)
    return None


def _is_of(node: exp.Expr, names: set[str]) -> bool:
    found = [column.name for column in node.find_all(exp.Column)]
    return bool(found) and all(name in names for name in found)


def _bounds(condition: exp.Expr, times: tuple[str, str]) -> Iterator[tuple[int | None, int | None]]:
    """Yields (least, greatest) of the right time less the left time, in us, that a condition demands."""
    if isinstance(condition, exp.Between):
        low, high = condition.args["low"].copy(), condition.args["high"].copy()
        yield from _bounds(exp.GTE(this=condition.this.copy(), expression=low), times)
        yield from _bounds(exp.LTE(this=condition.this.copy(), expression=high), times)
        return
    if type(condition) not in _FLIPPED:
        return
    operator: type[exp.Expr] = type(condition)
    first, second = _term(condition.args["this"], times), _term(condition.args["expression"], times)
    if first is None or second is None or first[0] == second[0]:
        return
    if first[0] == 0:  # the left side's time comes first
        operator, first, second = _FLIPPED[operator], second, first
    difference = second[1] - first[1]
    if operator in (exp.GT, exp.GTE):
        yield difference, None
    elif operator in (exp.LT, exp.LTE):
        yield None, difference
    else:
        yield difference, difference


def _term(node: exp.Expr, times: tuple[str, str]) -> tuple[int, int] | None:
    """Returns (side, us) of a side's event time plus or less a fixed interval, None for another expression."""
    while isinstance(node, exp.Paren):
        node = node.this
    if isinstance(node, exp.Column) and node.name in times and node.name:
        return times.index(node.name), 0
    if isinstance(node, exp.Add | exp.Sub) and isinstance(node.args["expression"], exp.Interval):
        found = _term(node.this, times)
        if found is None:
            return None
        try:
            length = microseconds("ON", "interval", node.args["expression"].sql(Verbatim))
        except InvalidStatement:
            return None  # of months, for example: the join is not bounded by it
        return found[0], found[1] + (length if isinstance(node, exp.Add) else -length)
    return None


def _as_of(version: exp.Expr, scope: Scope, times: tuple[str, str], rest: Sequence[str]) -> str:
    """Returns the left side's time of FOR SYSTEM_TIME AS OF. Raises InvalidStatement."""
    time = version.args.get("expression")
    if version.args.get("kind") != "AS OF" or time is None:
        raise InvalidStatement(f"{version.sql(Verbatim)} is not supported; FOR SYSTEM_TIME AS OF is", clause="FOR")
    found = written(resolved(time, scope))
    if not times[0] or found != quoted(times[0]):
        raise InvalidStatement(
            f"FOR SYSTEM_TIME AS OF {time.sql(Verbatim)} is not supported: it must be the left side's column with a "
            "WATERMARK",
            clause="FOR SYSTEM_TIME AS OF",
        )
    if not times[1]:
        raise InvalidStatement(
            "FOR SYSTEM_TIME AS OF needs a WATERMARK on the right side, too: the times of its versions",
            clause="FOR SYSTEM_TIME AS OF",
        )
    if rest:
        raise InvalidStatement(
            f"FOR SYSTEM_TIME AS OF takes equalities in ON, and WHERE the rest; found {rest[0]}", clause="ON"
        )
    return times[0]
