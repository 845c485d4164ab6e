"""Tables with a primary key: each record takes the row of its key away, and adds a new one, unless its value is null.

Invariants of the state: one row per key that any record had, that of the greatest (partition, offset), as a query over
all records has it; a key whose newest record has a null value has a row that is dead, since an older record of another
partition may still come.
"""

from __future__ import annotations

from streamhouse_sql.core.continuous.build import Builder, Relation, listed, same
from streamhouse_sql.core.continuous.model import NOW_US, OFFSET, PARTITION, WEIGHT, Expiry
from streamhouse_sql.core.quoting import quoted
from streamhouse_sql.core.tables import TableDefinition

DEAD = "#dead"
CHANGED = "#c"


def upserts(builder: Builder, table: TableDefinition, rows: str, columns: tuple[str, ...]) -> Relation:
    """Returns the changes of a table's rows. `rows`: a SELECT of these columns of the records, with DEAD and their
    places."""
    key = table.primary_key
    operator = f"newest row of each {', '.join(key)} of table {table.name}"
    builder.operators.append(operator)
    kept = [*columns, PARTITION, OFFSET, DEAD]
    changed = f", {NOW_US}::BIGINT AS {quoted(CHANGED)}" if builder.options.ttl_us else ""
    newest = (
        f"SELECT {listed(kept)} FROM ({rows}) QUALIFY row_number() OVER (PARTITION BY {listed(key)} "
        f"ORDER BY {quoted(PARTITION)} DESC, {quoted(OFFSET)} DESC) = 1"
    )
    state = builder.state(
        f"SELECT *{changed} FROM ({newest})", operator=operator, holds="a row for each key", bound=builder.ttl_bound()
    )
    change = builder.new("d")
    old = ", ".join(f"s.{quoted(name)} AS {quoted('o' + name)}" for name in kept)
    builder.make(
        change,
        f"SELECT n.*, {old} FROM ({newest}) AS n LEFT JOIN {state} AS s ON {same('n', 's', key)} "
        f"WHERE s.{quoted(DEAD)} IS NULL OR (n.{quoted(PARTITION)}, n.{quoted(OFFSET)}) > "
        f"(s.{quoted(PARTITION)}, s.{quoted(OFFSET)})",
    )
    builder.do(f"DELETE FROM {state} AS s WHERE EXISTS (SELECT 1 FROM {change} AS d WHERE {same('s', 'd', key)})")
    builder.do(f"INSERT INTO {state} SELECT {listed(kept)}{changed} FROM {change}")
    if builder.options.ttl_us:
        builder.expiries.append(Expiry(table=state, column=quoted(CHANGED), ttl_us=builder.options.ttl_us))
    was = f"NOT coalesce({quoted('o' + DEAD)}, true)"
    differs = " OR ".join(
        [
            f"{quoted(DEAD)} IS DISTINCT FROM {quoted('o' + DEAD)}",
            *(f"{quoted(name)} IS DISTINCT FROM {quoted('o' + name)}" for name in columns),
        ]
    )
    before = ", ".join(f"{quoted('o' + name)} AS {quoted(name)}" for name in columns)
    weight = quoted(WEIGHT)
    return Relation(
        sql=f"SELECT {before}, -1 AS {weight} FROM {change} WHERE {was} AND ({differs}) UNION ALL "
        f"SELECT {listed(columns)}, 1 AS {weight} FROM {change} WHERE NOT {quoted(DEAD)} AND ({differs})",
        columns=columns,
        is_changelog=True,
        key=key,
        sort=key,
    )
