"""Values of groups beside their state: for COUNT(DISTINCT …), and for MIN and MAX over rows that may be taken away.

Invariants of a set table: one row per key and value (or per slice, key and value, until they are put together), with a
bit for each FILTER under which the value was counted. Values are only ever added. Of a table of counted values: one row
per key and value that the group still has, with the number of its rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from shproto.errors import InvalidStatement

from streamhouse_sql.core.continuous.aggregates import Aggregate
from streamhouse_sql.core.continuous.build import Builder, listed, same
from streamhouse_sql.core.continuous.model import WEIGHT
from streamhouse_sql.core.continuous.nodes import Group
from streamhouse_sql.core.quoting import quoted

FILTERS_MAX = 63


class DistinctSets:
    """Sets of a group: one for each expression that is counted. `keys`: (name, expression) of the group."""

    def __init__(
        self,
        builder: Builder,
        keys: Sequence[tuple[str, str]],
        calls: Sequence[Aggregate],
        *,
        bound: str,
        operator: str,
    ) -> None:
        self._builder = builder
        self._keys = tuple(keys)
        self._filters: dict[str, list[str]] = {}
        for call in calls:
            filters = self._filters.setdefault(call.arguments[0], [])
            if call.where not in filters:
                filters.append(call.where)
            if len(filters) > FILTERS_MAX:
                raise InvalidStatement(
                    f"count(DISTINCT {call.arguments[0]}) has more than {FILTERS_MAX} FILTERs",
                    clause="FILTER",
                )
        self._bound = bound
        self._operator = operator
        self._tables: dict[str, str] = {}

    @property
    def tables(self) -> tuple[str, ...]:
        """The state tables."""
        return tuple(self._tables.values())

    def places(self, node: Group) -> list[tuple[str, int, int]]:
        """Returns (part, number of the value, bit of the FILTER) of the node's distinct counts."""
        found = []
        for name, call in node.aggregates:
            if call.distinct:
                filters = self._filters[call.arguments[0]]
                value = list(self._filters).index(call.arguments[0])
                found.append((f"{name}p0", value, filters.index(call.where)))
        return found

    def _new_values(self, source: str, value: str) -> str:
        """Returns a SELECT of the values of a micro-batch, with the FILTERs they are counted under."""
        keys = [f"{sql} AS {quoted(name)}" for name, sql in self._keys]
        bits = [
            f"CASE WHEN {where} THEN {1 << bit}::UBIGINT ELSE 0::UBIGINT END" if where else f"{1 << bit}::UBIGINT"
            for bit, where in enumerate(self._filters[value])
        ]
        terms = ", ".join([*keys, f'{value} AS "#x"', f'bit_or({" | ".join(bits)}) AS "#m"'])
        by = ", ".join(str(at) for at in range(1, len(keys) + 2))
        return f'SELECT {terms} FROM ({source}) WHERE ({value}) IS NOT NULL GROUP BY {by} HAVING "#m" <> 0'

    def _table(self, source: str, value: str) -> str:
        if value not in self._tables:
            self._tables[value] = self._builder.state(
                self._new_values(source, value),
                operator=self._operator,
                holds=f"the distinct values of {value} for each group",
                bound=self._bound,
            )
        return self._tables[value]

    # ---- each change

    def joined(self, source: str, partial: str, node: Group) -> str:
        """Returns partial results with the numbers of values that are new in the state. Adds these to it."""
        names = [name for name, _ in self._keys]
        for number, value in enumerate(self._filters):
            table = self._table(source, value)
            new = self._builder.new("d")
            keys = [*names, "#x"]
            self._builder.make(
                new,
                f'SELECT {listed(keys, "n")}, n."#m", coalesce(t."#m", 0)::UBIGINT AS "#old" '
                f"FROM ({self._new_values(source, value)}) AS n LEFT JOIN {table} AS t ON {same('n', 't', keys)} "
                f'WHERE t."#m" IS NULL OR (t."#m" | n."#m") <> t."#m"',
            )
            # Not by MERGE: see groups.py.
            self._builder.do(
                f'DELETE FROM {table} AS t USING {new} AS n WHERE n."#old" <> 0 AND {same("t", "n", keys)}'
            )
            self._builder.do(f'INSERT INTO {table} SELECT {listed(keys)}, "#m" | "#old" FROM {new}')
            parts = [(part, bit) for part, at, bit in self.places(node) if at == number]
            counts = [
                f'count(*) FILTER (WHERE ("#m" & {1 << bit}) <> 0 AND ("#old" & {1 << bit}) = 0) AS {quoted(part)}'
                for part, bit in parts
            ]
            by = f" GROUP BY {', '.join(str(at) for at in range(1, len(names) + 1))}" if names else ""
            counted = f"SELECT {', '.join([*map(quoted, names), *counts])} FROM {new}{by}"
            given = ", ".join(f"coalesce(q.{quoted(part)}, 0) AS {quoted(part)}" for part, _ in parts)
            partial = (
                f"SELECT g.* REPLACE ({given}) FROM ({partial}) AS g LEFT JOIN ({counted}) AS q "
                f"ON {same('g', 'q', names)}"
            )
        return partial

    # ---- once, when windows end

    def insert(self, source: str) -> None:
        """Adds the values of a micro-batch."""
        names = [*(name for name, _ in self._keys), "#x"]
        by = ", ".join(str(at) for at in range(1, len(names) + 1))
        for value in self._filters:
            table = self._table(source, value)
            self._builder.do(f"INSERT INTO {table} {self._new_values(source, value)}")
            self._builder.compactions.append(
                (table, f'SELECT {listed(names)}, bit_or("#m") AS "#m" FROM {table} GROUP BY {by}')
            )

    def counted(self, ended: str, window: Sequence[str], ends: str, node: Group) -> str:
        """Returns the results of windows that have ended with the numbers of their distinct values. `ends`: SELECT of a
        state table's rows in these windows."""
        by = ", ".join(str(at) for at in range(1, len(window) + 1))
        for number, table in enumerate(self._tables.values()):
            parts = [(part, bit) for part, at, bit in self.places(node) if at == number]
            counts = [f'count(*) FILTER (WHERE ("#m" & {1 << bit}) <> 0) AS {quoted(part)}' for part, bit in parts]
            values = (
                f'SELECT {listed(window)}, "#x", bit_or("#m") AS "#m" FROM ({ends.format(table)}) '
                f"GROUP BY {by}, {len(window) + 1}"
            )
            counted = f"SELECT {', '.join([*map(quoted, window), *counts])} FROM ({values}) GROUP BY {by}"
            given = ", ".join(f"q.{quoted(part)}" for part, _ in parts)
            ended = f"SELECT g.*, {given} FROM ({ended}) AS g LEFT JOIN ({counted}) AS q ON {same('g', 'q', window)}"
        return ended


class CountedValues:
    """Values of a group's rows with their numbers, for each expression and FILTER whose least, greatest or number of
    values is asked for. `keys`: (name, expression) of the group."""

    def __init__(
        self,
        builder: Builder,
        keys: Sequence[tuple[str, str]],
        node: Group,
        *,
        bound: str,
        operator: str,
    ) -> None:
        self._builder = builder
        self._keys = tuple(keys)
        self._bound = bound
        self._operator = operator
        # Parts by the values that they are of.
        self._parts: dict[tuple[str, str], list[tuple[str, str]]] = {}
        for name, call in node.aggregates:
            if call.needs_values:
                value = "count(*)" if call.distinct else f'{call.function}("#x")'
                self._parts.setdefault((call.arguments[0], call.where), []).append((f"{name}p0", value))
        self.tables: list[str] = []

    def joined(self, source: str, partial: str) -> str:
        """Returns partial results with the values of the groups as they are now. Brings these up to date."""
        names = [name for name, _ in self._keys]
        keys = [f"{sql} AS {quoted(name)}" for name, sql in self._keys]
        by = ", ".join(str(at) for at in range(1, len(names) + 2))
        for (value, where), parts in self._parts.items():
            known = f"({value}) IS NOT NULL" + (f" AND ({where})" if where else "")
            total = f"sum({quoted(WEIGHT)})::BIGINT"
            terms = ", ".join([*keys, f'{value} AS "#x"', f'{total} AS "#m"'])
            new, known_values = self._builder.new("d"), [*names, "#x"]
            changes = f"SELECT {terms} FROM ({source}) WHERE {known} GROUP BY {by} HAVING {total} <> 0"
            table = self._builder.state(
                changes,
                operator=self._operator,
                holds=f"the values of {value} of each group",
                bound=self._bound,
            )
            self.tables.append(table)
            self._builder.make(
                new,
                f'SELECT {listed(known_values, "n")}, coalesce(t."#m", 0) + n."#m" AS "#m" FROM ({changes}) AS n '
                f"LEFT JOIN {table} AS t ON {same('n', 't', known_values)}",
            )
            self._builder.do(f"DELETE FROM {table} AS t USING {new} AS n WHERE {same('t', 'n', known_values)}")
            self._builder.do(f'INSERT INTO {table} SELECT * FROM {new} WHERE "#m" > 0')
            touched = f"SELECT DISTINCT {', '.join(keys) or '1 AS one'} FROM ({source})"
            values = [f"{found} AS {quoted(part)}" for part, found in parts]
            groups = f" GROUP BY {listed(names, 't')}" if names else ""
            found = (
                f"SELECT {', '.join([*(f't.{quoted(name)}' for name in names), *values])} FROM {table} AS t "
                f"SEMI JOIN ({touched}) AS g ON {same('t', 'g', names)}{groups}"
            )
            given = ", ".join(f"q.{quoted(part)} AS {quoted(part)}" for part, _ in parts)
            partial = (
                f"SELECT g.* REPLACE ({given}) FROM ({partial}) AS g LEFT JOIN ({found}) AS q "
                f"ON {same('g', 'q', names)}"
            )
        return partial
