"""Names to topics, and predicates to ranges that are read.

Push-down only ever leaves out records that the query's own WHERE would drop: the predicate stays in the query, and a
predicate that is not understood costs time, never a row.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from shproto.errors import InvalidStatement
from sqlglot import exp
from sqlglot.errors import OptimizeError
from sqlglot.optimizer.scope import Scope, traverse_scope

from streamhouse_sql.core.columns import COLUMN_NAMES
from streamhouse_sql.core.parameters import Parameters, parameter_edits, with_values
from streamhouse_sql.core.statement import DIALECT, Query
from streamhouse_sql.core.tables import (
    TableColumn,
    TableDefinition,
    decodes_in_arrow,
    needed_columns,
    record_columns_of,
    select_of,
)
from streamhouse_sql.core.windows import ADDED

# DuckDB's own dialect, in which it runs.
WRITTEN_IN = "duckdb"
_TABLE_STATEMENT = re.compile(r"\bTABLE\s+$", re.IGNORECASE)

# Functions that stand for tables and read nothing but their arguments.
TABLE_FUNCTIONS = (exp.GenerateSeries, exp.Unnest, exp.Values)
TABLE_FUNCTION_NAMES = {"RANGE", "GENERATE_SERIES", "UNNEST", "JSON_EACH", "JSON_TREE"}
# Functions of values that are refused: they run SQL that was not checked, show or change the engine's own state, or, as
# json_contains and casts to VARIANT with values of some 100,000 levels, end the process that computes them.
REFUSED_FUNCTIONS = {
    "json_contains",
    "json_execute_serialized_sql",
    "json_deserialize_sql",
    "json_serialize_plan",
    "json_serialize_sql",
    "query",
    "query_table",
    "getenv",
    "glob",
    "checkpoint",
    "force_checkpoint",
    "current_setting",
    "nextval",
    "currval",
    "sniff_csv",
    "which_secret",
    "write_log",
}
REFUSED_PREFIXES = ("read_", "duckdb_", "pragma_", "parquet_", "test_", "to_variant", "variant_", "__internal")
# Joins for which a row that WHERE drops changes nothing about the other rows. An ASOF join would pick another partner
# for a row, a positional join would pair other rows, an anti join keeps what has no partner.
PUSHED_JOIN_KINDS = {"", "INNER", "CROSS", "OUTER"}
PUSHED_JOIN_METHODS = {"", "NATURAL"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushdown:
    """Range of a topic that a query needs. `partitions` None: all. Offsets are [offset_min, offset_max), None: no
    limit. `timestamps_min`: SQL of constants; no record older than all of them is needed."""

    partitions: frozenset[int] | None = None
    offset_min: int | None = None
    offset_max: int | None = None
    timestamps_min: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicScan:
    """A topic as a FROM or JOIN of a query reads it. `name`: of the table that stands for it in the bound SQL. `table`,
    `fields`: the declared table whose values are decoded before the engine, and its columns that are needed."""

    name: str
    topic: str
    columns: tuple[str, ...]
    pushdown: Pushdown = field(default_factory=Pushdown)
    table: TableDefinition | None = None
    fields: tuple[TableColumn, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewScan:
    """A materialized view as a FROM or JOIN of a query reads it. `name`: of the table that stands for it in the bound
    SQL. `columns`: (name, DuckDB type). `equals`: (column, value) that all rows have that the query needs."""

    name: str
    view: str
    columns: tuple[tuple[str, str], ...]
    equals: tuple[tuple[str, int | str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundQuery:
    """SQL for DuckDB over tables that the scans fill. `values`: of its parameters, by name."""

    sql: str
    scans: tuple[TopicScan, ...]
    values: Mapping[str, object] = field(default_factory=dict)
    views: tuple[ViewScan, ...] = ()


_NO_PARAMETERS = Parameters()
_NO_VIEWS: Mapping[str, tuple[tuple[str, str], ...]] = {}


def bind(
    query: Query,
    topics: Collection[str],
    tables: Mapping[str, TableDefinition],
    parameters: Parameters = _NO_PARAMETERS,
    *,
    all_columns: bool = False,
    views: Mapping[str, tuple[tuple[str, str], ...]] = _NO_VIEWS,
) -> BoundQuery:
    """Returns the query over its topics. `topics`: the names of all topics; `tables`: the declared tables by name in
    small letters, and `views`: the columns of the views, which both come before topics of the same name. `all_columns`:
    the scans have all columns, not only those that the query names. Raises InvalidStatement for a name that is none of
    these, with the nearest one.

    The query's own text is kept, but for the names of tables: each is replaced by a scan, under the same name; and for
    parameters, which get their types.
    """
    try:
        return _bind(query, topics, tables, parameters, views, all_columns=all_columns)
    except RecursionError:
        raise InvalidStatement("the statement is nested too deeply") from None
    except OptimizeError as error:  # of the scopes: a part of the query that is none
        raise InvalidStatement(f"the statement has an error of syntax: {error}") from error
    except InvalidStatement as error:
        raise query.expansion.with_place(error) from error.__cause__


def _bind(
    query: Query,
    topics: Collection[str],
    tables: Mapping[str, TableDefinition],
    parameters: Parameters,
    views: Mapping[str, tuple[tuple[str, str], ...]],
    *,
    all_columns: bool,
) -> BoundQuery:
    named = None if all_columns else _columns_of(query.tree)
    prefix = _scan_prefix(query.text)
    scans: list[TopicScan] = []
    view_scans: list[ViewScan] = []
    edits = parameter_edits(query.text, parameters.types)
    bound: set[int] = set()  # tables of the tree, by identity
    for scope in traverse_scope(query.tree):
        for source in scope.sources.values():
            if not isinstance(source, exp.Table) or id(source) in bound:
                continue
            bound.add(id(source))
            if _is_cte(scope, source) or not _is_topic(source):
                continue
            name = f"{prefix}{len(scans) + len(view_scans)}"
            if (view := _view_of(source, views)) is not None:
                edits.append(_edit(query.text, source, name))
                equals = _equals(scope, source, view, parameters)
                view_scans.append(ViewScan(name=name, view=source.name.lower(), columns=view, equals=equals))
                continue
            alias = source.args.get("alias")
            renamed = bool(alias is not None and alias.columns)
            pushdown = Pushdown() if renamed else _pushdown(scope, source, parameters)
            # `t AS x(a, b)` renames columns by their places: all have to be there.
            needed = None if renamed else named
            found = _found(source, topics, tables)
            if isinstance(found, str):
                topic, written, fields = found, name, []
                columns = tuple(column for column in COLUMN_NAMES if needed is None or column in needed)
            else:
                topic = found.topic
                if found.primary_key:  # what is left out could hide which row is the newest
                    pushdown = Pushdown()
                if topic not in topics:
                    raise InvalidStatement(f"table {source.name}: there is no topic {topic!r}", name=topic)
                hidden = [] if renamed else [name for name in COLUMN_NAMES if _names(query.tree, name)]
                if hidden and named is None and not all_columns:
                    _refuse_star_beside(scope, hidden[0])
                fields = needed_columns(found, needed)
                written = f"({select_of(found, name, fields, hidden)})"
                columns = tuple(record_columns_of(found, fields, hidden))
            edits.append(_edit(query.text, source, written))
            scans.append(
                TopicScan(
                    name=name,
                    topic=topic,
                    columns=columns,
                    pushdown=pushdown,
                    table=None if isinstance(found, str) or not decodes_in_arrow(found) else found,
                    fields=tuple(fields),
                )
            )
    _check_functions(query.tree)
    _check_all_bound(query.tree, bound)
    return BoundQuery(
        sql=_edited(query.text, edits), scans=tuple(scans), values=parameters.named(), views=tuple(view_scans)
    )


def _view_of(table: exp.Table, views: Mapping[str, tuple[tuple[str, str], ...]]) -> tuple[tuple[str, str], ...] | None:
    """Returns the columns of the view of that name, None if there is none."""
    if table.catalog or (table.db and table.db.lower() != "public"):
        return None
    return views.get(table.name.lower())


def _scan_prefix(text: str) -> str:
    """Returns the beginning of the scans' names, which the text has nowhere."""
    prefix = "scan_"
    while prefix in text.lower():
        prefix = f"_{prefix}"
    return prefix


def _is_cte(scope: Scope, table: exp.Table) -> bool:
    """Returns True if the name is that of a common table expression. DuckDB looks these up in any case of letters; the
    scopes, which do not, have those of the same case as sources of their own."""
    if table.db:
        return False
    name = table.name.lower()
    if any(cte.lower() == name for cte in scope.cte_sources):
        return True
    inside = table.find_ancestor(exp.CTE)
    while inside is not None:
        around = inside.parent
        if inside.alias.lower() == name and isinstance(around, exp.With) and around.recursive:
            return True
        inside = inside.find_ancestor(exp.CTE)
    return False


def _edit(text: str, table: exp.Table, written: str) -> tuple[int, int, str]:
    """Returns (start, end, replacement) of the table's name in the text."""
    places = [part.meta for part in table.parts]
    if not all("start" in place and "end" in place for place in places):
        raise InvalidStatement(f"{table.sql(DIALECT)} cannot be read in this place of a query")
    start, end = min(place["start"] for place in places), max(place["end"] for place in places) + 1
    if _TABLE_STATEMENT.search(text, 0, start):
        raise InvalidStatement(f"TABLE {table.name} is not supported: SELECT * FROM {table.name} is", clause="TABLE")
    if table.args.get("alias") is None:
        written = f"{written} AS {exp.to_identifier(table.name, quoted=True).sql(WRITTEN_IN)}"
    return start, end, written


def _edited(text: str, edits: Collection[tuple[int, int, str]]) -> str:
    parts, at = [], 0
    for start, end, written in sorted(edits):
        parts += [text[at:start], written]
        at = end
    return "".join([*parts, text[at:]]).strip()


def _is_topic(table: exp.Table) -> bool:
    """Returns True for a name, False for a function that is allowed to stand for a table. Raises InvalidStatement for
    other functions: those of DuckDB that read files or its own state."""
    if isinstance(table.this, exp.Identifier):
        return True
    function = table.this
    if isinstance(function, TABLE_FUNCTIONS):
        return False
    if not isinstance(function, exp.Func):
        raise InvalidStatement(f"{table.sql(DIALECT)} cannot be read in this place of a query")
    name = function.name.upper() if isinstance(function, exp.Anonymous) else function.sql_name()
    if name in TABLE_FUNCTION_NAMES:
        return False
    raise InvalidStatement(f"the table function {name.lower()} is not supported", clause=name)


def _found(table: exp.Table, topics: Collection[str], tables: Mapping[str, TableDefinition]) -> TableDefinition | str:
    """Returns the declared table, or the topic, of a name in a query."""
    name = table.name
    schema = table.db
    place = _place(table.this)
    if table.catalog or (schema and schema.lower() != "public"):
        quoted = ".".join(part.name for part in table.parts)
        raise InvalidStatement(
            f'{place}there is no schema {schema!r}; a topic with dots in its name is quoted: "{quoted}"',
            **_at(table.this),
        )
    if declared := tables.get(name.lower()):
        return declared
    if name in topics:
        return name
    alike = [topic for topic in topics if topic.lower() == name.lower()]
    if len(alike) == 1 and not table.this.quoted:
        return alike[0]
    nearest = difflib.get_close_matches(name, [*tables, *topics], 1) or alike[:1]
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise InvalidStatement(f"{place}there is no table or topic {name!r}{hint}", name=name, **_at(table.this))


def _names(tree: exp.Expr, name: str) -> bool:
    return any(column.name.lower() == name for column in tree.find_all(exp.Column))


def _refuse_star_beside(scope: Scope, hidden: str) -> None:
    """Refuses `SELECT *, _offset` of a declared table: the star would have `_offset`, too, and so twice."""
    for star in scope.expression.find_all(exp.Star):
        if not isinstance(star.parent, exp.Count):
            raise InvalidStatement(
                f"{hidden} beside * is not supported for a declared table: name the columns, or declare "
                f"{hidden.lstrip('_')} as a METADATA column"
            )


def _check_functions(tree: exp.Query) -> None:
    """Refuses functions that stand for tables anywhere but in FROM, where `_is_topic` has seen them, and functions that
    read files or DuckDB's own state, run other SQL, or end the process."""
    for lateral in tree.find_all(exp.Lateral):
        if not isinstance(lateral.this, (exp.Subquery, exp.Select, *TABLE_FUNCTIONS)):
            name = lateral.this.name if isinstance(lateral.this, exp.Anonymous) else lateral.this.sql(DIALECT)
            raise InvalidStatement(f"LATERAL {name} is not supported: LATERAL takes a subquery", clause="LATERAL")
    for function in tree.find_all(exp.Func):
        name = function.name if isinstance(function, exp.Anonymous) else function.sql_name()
        if name.lower() in REFUSED_FUNCTIONS or name.lower().startswith(REFUSED_PREFIXES):
            raise InvalidStatement(f"the function {name.lower()} is not supported", clause=name)
    for kind in tree.find_all(exp.DataType):
        if kind.this == exp.DType.VARIANT:
            raise InvalidStatement("the type VARIANT is not supported", clause="VARIANT")


def _check_all_bound(tree: exp.Query, bound: Collection[int]) -> None:
    """Refuses a table that no scope has, so that DuckDB never meets a name that was not looked up here."""
    ctes = {cte.alias.lower() for cte in tree.find_all(exp.CTE)}
    for table in tree.find_all(exp.Table):
        if id(table) not in bound and (table.db or table.name.lower() not in ctes):
            raise InvalidStatement(f"{table.sql(DIALECT)} cannot be read in this place of a query")
    for node in tree.find_all(exp.Pivot, exp.Summarize):
        raise InvalidStatement(f"{node.key.upper()} is not supported", clause=node.key.upper())


def _columns_of(tree: exp.Query) -> frozenset[str] | None:
    """Returns all names that stand anywhere in the query, in small letters, among them those of the columns it needs;
    None if it may mean columns that it does not name."""
    tables = {name.lower() for table in tree.find_all(exp.Table) for name in (table.alias_or_name, table.name)}
    for node in tree.walk():
        if isinstance(node, exp.Star) and not isinstance(node.parent, exp.Count) and not _is_of_window(node):
            return None
        if isinstance(node, exp.Columns) or (isinstance(node, exp.Join) and node.method.upper() == "NATURAL"):
            return None
        if isinstance(node, exp.Column) and node.name.lower() in tables:  # a whole row as a value
            return None
    return frozenset(identifier.name.lower() for identifier in tree.find_all(exp.Identifier))


def _is_of_window(star: exp.Star) -> bool:
    return any(ADDED in comment for comment in star.comments or ())


# ---- predicates


def _pushdown(scope: Scope, table: exp.Table, parameters: Parameters) -> Pushdown:
    select = scope.expression
    if not isinstance(select, exp.Select) or table.find_ancestor(exp.Select) is not select:
        return Pushdown()  # a lateral subquery sees the table, too, and its WHERE is about its own rows
    where = select.args.get("where")
    if where is None or not _joins_allow(select) or table.args.get("sample") or select.args.get("sample"):
        return Pushdown()
    partitions: frozenset[int] | None = None
    offset_min: int | None = None
    offset_max: int | None = None
    timestamps: list[str] = []
    for column, operator, compared in _comparisons(where.this, table.alias_or_name, alone=len(scope.sources) == 1):
        values = [with_values(value, parameters) for value in compared]
        numbers = [_integer(value) for value in values]
        if column == "_timestamp":
            if operator in (">", ">=", "=", "between") and _is_constant(values[0]):
                timestamps.append(values[0].sql(WRITTEN_IN))
        elif None in numbers:
            continue
        elif column == "_partition" and operator in ("=", "in"):
            wanted = frozenset(number for number in numbers if number is not None)
            partitions = wanted if partitions is None else partitions & wanted
        elif column == "_offset":
            low, high = _offsets(operator, [number for number in numbers if number is not None])
            offset_min = low if offset_min is None or (low is not None and low > offset_min) else offset_min
            offset_max = high if offset_max is None or (high is not None and high < offset_max) else offset_max
    return Pushdown(
        partitions=partitions, offset_min=offset_min, offset_max=offset_max, timestamps_min=tuple(timestamps)
    )


def _equals(
    scope: Scope, table: exp.Table, columns: tuple[tuple[str, str], ...], parameters: Parameters
) -> tuple[tuple[str, int | str], ...]:
    """Returns the columns of a view that WHERE compares with a constant of their own type: a view is looked up by
    them. Other comparisons cast, and are left to the query."""
    select = scope.expression
    alias = table.args.get("alias")
    where = select.args.get("where") if isinstance(select, exp.Select) else None
    if where is None or table.find_ancestor(exp.Select) is not select or (alias is not None and alias.columns):
        return ()
    if not _joins_allow(select) or table.args.get("sample") or select.args.get("sample"):
        return ()
    known = {name.lower(): (name, kind) for name, kind in columns}
    found: dict[str, int | str] = {}
    for column, operator, compared in _comparisons(where.this, table.alias_or_name, alone=len(scope.sources) == 1):
        if operator != "=" or column not in known:
            continue
        name, kind = known[column]
        value = with_values(compared[0], parameters)
        number = _integer(value)
        if kind in _INTEGERS and number is not None and -(1 << 63) <= number < 1 << 63:
            found[name] = number
        elif kind == "VARCHAR" and isinstance(value, exp.Literal) and value.is_string:
            found[name] = value.name
    return tuple(found.items())


_INTEGERS = ("BIGINT", "INTEGER", "SMALLINT", "TINYINT")


def _joins_allow(select: exp.Select) -> bool:
    return all(
        join.kind.upper() in PUSHED_JOIN_KINDS and join.method.upper() in PUSHED_JOIN_METHODS
        for join in select.args.get("joins") or ()
    ) and not select.args.get("laterals")


def _offsets(operator: str, numbers: list[int]) -> tuple[int | None, int | None]:
    """Returns offsets [low, high) that a comparison leaves."""
    match operator:
        case "=":
            return numbers[0], numbers[0] + 1
        case "in":
            return min(numbers), max(numbers) + 1
        case "between":
            return numbers[0], numbers[1] + 1
        case ">":
            return numbers[0] + 1, None
        case ">=":
            return numbers[0], None
        case "<":
            return None, numbers[0]
        case "<=":
            return None, numbers[0] + 1
    return None, None


_OPERATORS: dict[type[exp.Expr], str] = {exp.EQ: "=", exp.GT: ">", exp.GTE: ">=", exp.LT: "<", exp.LTE: "<="}
_MIRRORED = {"=": "=", ">": "<", ">=": "<=", "<": ">", "<=": ">="}


def _comparisons(condition: exp.Expr, table: str, *, alone: bool) -> Iterator[tuple[str, str, list[exp.Expr]]]:
    """Yields (column, operator, values) of those parts of a condition that all have to be true and compare a column of
    the table with other expressions. `alone`: the table is the only one, so that a column needs no name of it."""
    parts = [condition]
    while parts:  # no recursion: a chain of ANDs is as deep as it is long
        part = parts.pop()
        if isinstance(part, exp.Paren):
            parts.append(part.this)
        elif isinstance(part, exp.And):
            parts += [part.args["this"], part.args["expression"]]
        elif isinstance(part, exp.Between):
            if (column := _column(part.this, table, alone)) and not part.args.get("symmetric"):
                yield column, "between", [part.args["low"], part.args["high"]]
        elif isinstance(part, exp.In):
            values = part.expressions
            if values and (column := _column(part.this, table, alone)):
                yield column, "in", values
        elif (operator := _OPERATORS.get(type(part))) is not None:
            left, right = part.args["this"], part.args["expression"]
            if column := _column(left, table, alone):
                yield column, operator, [right]
            elif column := _column(right, table, alone):
                yield column, _MIRRORED[operator], [left]


def _column(node: exp.Expr, table: str, alone: bool) -> str:
    """Returns the name of the table's column, or an empty text for any other expression."""
    if not isinstance(node, exp.Column) or len(node.parts) > 2:
        return ""
    is_of_table = node.table.lower() == table.lower() if node.table else alone
    return node.name.lower() if is_of_table else ""


def _integer(node: exp.Expr) -> int | None:
    """Returns the number of an integer literal, else None."""
    if isinstance(node, exp.Neg):
        number = _integer(node.this)
        return None if number is None else -number
    if isinstance(node, exp.Literal) and not node.is_string and node.name.isdigit():
        return int(node.name)
    if isinstance(node, exp.Cast) and node.to.is_type("BIGINT", "INT", "SMALLINT"):
        return _integer(node.this)  # a number that does not fit is an error of the query
    return None


# Functions of a constant that change nothing about it being one while a query runs.
_CONSTANT = (
    exp.Literal,
    exp.Cast,
    exp.DataType,
    exp.Interval,
    exp.Var,
    exp.Neg,
    exp.Paren,
    exp.Add,
    exp.Sub,
    exp.Identifier,
)


def _is_constant(node: exp.Expr) -> bool:
    """Returns True for an expression of constants and the time that it is. The query computes it a moment later: with
    the time subtracted from something, its value would be lower then, and records between the two would be missing."""
    return all(
        isinstance(part, _CONSTANT) or (_is_now(part) and not _is_subtracted(part, node)) for part in node.walk()
    )


def _is_now(node: exp.Expr) -> bool:
    return isinstance(node, exp.CurrentTimestamp | exp.CurrentDate) or (
        isinstance(node, exp.Anonymous) and node.name.upper() == "NOW"
    )


def _is_subtracted(part: exp.Expr, whole: exp.Expr) -> bool:
    while part is not whole and (parent := part.parent) is not None:
        if isinstance(parent, exp.Neg) or (isinstance(parent, exp.Sub) and parent.args["expression"] is part):
            return True
        part = parent
    return False


# ---- errors


def with_suggestion(message: str, tables: Mapping[str, TableDefinition]) -> str:
    """Returns DuckDB's message about a column that a table does not have, with the nearest name: it says the columns
    only where the query does not say which table. `tables`: the declared tables."""
    found = _NO_COLUMN.fullmatch(message)
    if found is None:
        return message
    names = [*COLUMN_NAMES, *(column.name for table in tables.values() for column in table.columns)]
    nearest = difflib.get_close_matches(found["column"], names, 1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"table {found['table']!r} has no column {found['column']!r}{hint}"


_NO_COLUMN = re.compile(r'(?:Values list|Table) "(?P<table>.*)" does not have a column named "(?P<column>.*)"')

# ---- places in the text


def _at(node: exp.Expr) -> dict[str, int]:
    """Returns line and column, from 1, of a node's first character; nothing where they are not known."""
    line, end = node.meta.get("line"), node.meta.get("col")
    if not isinstance(line, int) or not isinstance(end, int):
        return {}
    return {"line": line, "column": max(1, end - (node.meta.get("end", 0) - node.meta.get("start", 0)))}


def _place(node: exp.Expr) -> str:
    at = _at(node)
    return f"line {at['line']}, column {at['column']}: " if at else ""
