"""Options of a continuous query: those of WITH, and EMIT."""

from __future__ import annotations

from shproto.errors import InvalidStatement
from sqlglot import exp
from sqlglot.errors import SqlglotError

from streamhouse_sql.core.continuous.build import Options
from streamhouse_sql.core.continuous.statements import ContinuousQuery
from streamhouse_sql.core.dialect import StreamHouse

_US = {"MILLISECOND": 1_000, "SECOND": 1_000_000, "MINUTE": 60_000_000, "HOUR": 3_600_000_000, "DAY": 86_400_000_000}


def options_of(query: ContinuousQuery) -> Options:
    """Returns how a query is compiled. Raises InvalidStatement for an option that does not fit."""
    ttl = query.options.get("state_ttl")
    return Options(
        emit_on_close=query.emit == "on window close",
        is_view=query.kind == "view",
        ttl_us=_duration_us("state_ttl", ttl) if ttl is not None else 0,
        renamed=query.columns,
    )


def _duration_us(name: str, text: str) -> int:
    """Returns the length of a text such as '1 hour' in microseconds."""
    try:
        node: exp.Expr = exp.maybe_parse(f"INTERVAL '{text.replace(chr(39), '')}'", dialect=StreamHouse)
    except SqlglotError:
        node = exp.null()
    if isinstance(node, exp.Interval) and node.this is not None and node.args.get("unit") is not None:
        unit = node.args["unit"].name.upper().removesuffix("S")
        if unit in _US and node.this.name.isdigit() and 0 < int(node.this.name) < 1_000_000:
            return int(node.this.name) * _US[unit]
    raise InvalidStatement(
        f"{name} is {text!r}, must be a whole number of {', '.join(u.lower() + 's' for u in _US)}: '1 hour'",
        clause=name,
    )
