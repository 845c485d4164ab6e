"""Tree of a continuous query to nodes. A construct that no node stands for is refused by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from shproto.errors import InvalidStatement
from sqlglot import exp

from streamhouse_sql.core.columns import COLUMN_NAMES
from streamhouse_sql.core.continuous.aggregates import Aggregate, aggregate_of, has_aggregate
from streamhouse_sql.core.continuous.joins import Tables, joined
from streamhouse_sql.core.continuous.names import Scope, check_marks, conjuncts, resolved, written
from streamhouse_sql.core.continuous.nodes import (
    Group,
    Node,
    Scan,
    Select,
    TopN,
    Union,
    Windowed,
    identity,
)
from streamhouse_sql.core.continuous.prune import pruned
from streamhouse_sql.core.continuous.statements import ContinuousQuery, parse_query
from streamhouse_sql.core.dialect import Verbatim
from streamhouse_sql.core.quoting import quoted
from streamhouse_sql.core.tables import TableDefinition
from streamhouse_sql.core.windows import Window

_SELECT_ARGS = {
    "with_",
    "expressions",
    "from_",
    "joins",
    "where",
    "group",
    "having",
    "qualify",
    "kind",
    "operation_modifiers",
}


def planned(query: ContinuousQuery, topics: Mapping[str, int], tables: Mapping[str, TableDefinition]) -> Node:
    """Returns the plan of a query. Raises InvalidStatement, with the place where it is known."""
    check_marks(query.text)
    try:
        node = _Planner(query, topics, tables).query(query.tree, {})
        _limited(None, node)
        for name in node.columns:
            if name.startswith(_UNNAMED) and not query.columns:
                raise InvalidStatement(f"column {name.removeprefix(_UNNAMED)} needs a name: … AS name", clause="AS")
        return pruned(node)
    except RecursionError:
        raise InvalidStatement("the statement is nested too deeply") from None
    except InvalidStatement as error:
        raise query.expansion.with_place(error) from error.__cause__


_UNNAMED = "#unnamed "
Ctes = Mapping[str, Node]


class _Planner:
    """Plans the SELECTs of a query, inside out."""

    def __init__(
        self, query: ContinuousQuery, topics: Mapping[str, int], tables: Mapping[str, TableDefinition]
    ) -> None:
        self._windows = dict(query.windows)
        self._topics = topics
        self._tables = tables
        self._has_star = _has_star(query.tree)
        self._named = {identifier.name.lower() for identifier in query.tree.find_all(exp.Identifier)}
        # The windows' tables come on top: their columns are found when they are planned, which is before the scans.
        for window in query.windows.values():
            self._named |= {window.time.strip('"').lower(), *(key.strip('"').lower() for key in window.keys)}

    def query(self, tree: exp.Expr, ctes: Ctes) -> Node:
        """Returns the plan of a SELECT or a UNION ALL."""
        while isinstance(tree, exp.Subquery):
            tree = tree.this
        known = dict(ctes)
        with_ = tree.args.get("with_")
        if with_ is not None:
            if with_.args.get("recursive"):
                raise InvalidStatement("WITH RECURSIVE is not supported in a continuous query", clause="RECURSIVE")
            for cte in with_.expressions:
                if cte.args.get("alias") and cte.args["alias"].columns:
                    raise InvalidStatement(
                        "WITH name (columns) is not supported: name them in its SELECT", clause="WITH"
                    )
                known[cte.alias.lower()] = self.query(cte.this, known)
        if isinstance(tree, exp.SetOperation):
            return self._union(tree, known)
        assert isinstance(tree, exp.Select)
        return self._select(tree, known)

    def _union(self, tree: exp.SetOperation, ctes: Ctes) -> Node:
        if not isinstance(tree, exp.Union) or tree.args.get("distinct") or tree.args.get("by_name"):
            name = tree.key.upper() if not isinstance(tree, exp.Union) else "UNION"
            raise InvalidStatement(f"{name} is not supported in a continuous query; UNION ALL is", clause=name)
        _refuse(tree, {"this", "expression", "with_", "distinct", "by_name"}, "UNION ALL")
        sides = [self.query(tree.this, ctes), self.query(tree.expression, ctes)]
        first, second = (len(side.columns) for side in sides)
        if first != second:
            raise InvalidStatement(f"UNION ALL of {first} and {second} columns", clause="UNION ALL")
        sources: list[Node] = []
        for side in sides:
            sources += side.sources if isinstance(side, Union) else [side]
        return Union(sources=tuple(sources))

    # ---- SELECT

    def _select(self, tree: exp.Select, ctes: Ctes) -> Node:
        _refuse(tree, _SELECT_ARGS, "SELECT")
        if tree.args.get("kind") or tree.args.get("operation_modifiers"):
            raise InvalidStatement(f"SELECT {tree.args.get('kind')} is not supported", clause="SELECT")
        source, tables, unnests = self._from(tree, ctes)
        scope = Scope(tables, _aliases(tree))
        items = self._items(tree, scope)
        where = tree.args.get("where")
        if where is not None and has_aggregate(where):
            raise InvalidStatement("an aggregate is not supported in WHERE; HAVING has them", clause="WHERE")
        condition, source = _limited(where.this if where is not None else None, source)
        kept = written(resolved(condition, scope)) if condition is not None else ""
        source = self._unnested(source, unnests)
        grouping = tree.args.get("group") is not None or tree.args.get("having") is not None
        if grouping or any(has_aggregate(item) for _, item in items):
            if tree.args.get("qualify") is not None:
                raise InvalidStatement(
                    "QUALIFY beside GROUP BY is not supported: put the aggregation into a subquery", clause="QUALIFY"
                )
            return self._group(tree, source, scope, items, kept)
        return self._projected(tree, source, scope, items, kept)

    def _unnested(self, source: Node, unnests: Sequence[tuple[str, exp.Expr, Scope]]) -> Node:
        for name, lists, scope in unnests:
            source = Select(
                source=source,
                items=(*identity(source), (name, quoted(name))),
                unnests=((name, written(resolved(lists, scope))),),
            )
        return source

    def _projected(
        self, tree: exp.Select, source: Node, scope: Scope, items: Sequence[tuple[str, exp.Expr]], where: str
    ) -> Node:
        qualify = tree.args.get("qualify")
        numbers = [(name, item) for name, item in items if isinstance(item, exp.Window)]
        if qualify is None and not numbers:
            plain = [(name, written(resolved(item, scope))) for name, item in items]
            unnests = tuple((name, _list_of(sql)) for name, sql in plain if sql.upper().startswith("UNNEST("))
            named = dict(unnests)
            return Select(
                source=source,
                items=tuple((name, quoted(name) if name in named else sql) for name, sql in plain),
                where=where,
                unnests=unnests,
            )
        if len(numbers) > 1:
            raise InvalidStatement("more than one row_number() is not supported", clause="OVER")
        rank = numbers[0][0] if numbers else ""
        window: exp.Expr | None = numbers[0][1] if numbers else None
        limit = -1
        if qualify is not None:
            window, limit, rank = _qualified(qualify.this, rank, window)
        assert window is not None
        filtered: Node = source
        if where:
            filtered = Select(source=source, items=identity(source), where=where)
        partition, order = _top_n_terms(window, scope)
        # The number has a name that no column has, until the items give it theirs.
        function = window.this.name.lower()
        top = TopN(
            source=filtered,
            partition=partition,
            order=order,
            limit=limit,
            rank="#rank" if rank else "",
            function=function,
        )
        shown = tuple(
            (name, quoted("#rank") if isinstance(item, exp.Window) else written(resolved(item, scope)))
            for name, item in items
        )
        return Select(source=top, items=shown)

    def _group(
        self, tree: exp.Select, source: Node, scope: Scope, items: Sequence[tuple[str, exp.Expr]], where: str
    ) -> Node:
        if where:
            source = Select(source=source, items=identity(source), where=where)
        keys: dict[str, str] = {}  # expression → name
        for key in _group_keys(tree, items):
            sql = written(_unparenthesised(resolved(key, scope)))
            keys.setdefault(sql, f"k{len(keys)}")
        aggregates: dict[Aggregate, str] = {}

        def split(node: exp.Expr) -> str:
            return written(_split(_unparenthesised(resolved(node, scope)), keys, aggregates))

        shown = tuple((name, split(item)) for name, item in items)
        having = tree.args.get("having")
        condition = split(having.this) if having is not None else ""
        return Group(
            source=source,
            keys=tuple((name, sql) for sql, name in keys.items()),
            aggregates=tuple((name, call) for call, name in aggregates.items()),
            items=shown,
            having=condition,
        )

    def _items(self, tree: exp.Select, scope: Scope) -> list[tuple[str, exp.Expr]]:
        """Returns (name, expression) of the SELECT's columns, stars expanded."""
        items: list[tuple[str, exp.Expr]] = []
        for number, item in enumerate(tree.expressions, 1):
            if isinstance(item, exp.Star) or (isinstance(item, exp.Column) and isinstance(item.this, exp.Star)):
                items += _star(item, scope)
                continue
            name = item.alias if isinstance(item, exp.Alias) else _name_of(item)
            if not name:  # only the result's columns need one
                name = f"{_UNNAMED}{number}: {item.sql(Verbatim)[:80]}"
            items.append((name, item.this if isinstance(item, exp.Alias) else item))
        names = [name.lower() for name, _ in items]
        for name in names:
            if names.count(name) > 1:
                raise InvalidStatement(f"SELECT has column {name} twice: give one another name with AS", clause=name)
            if name.startswith("#") and not name.startswith(_UNNAMED):
                raise InvalidStatement(f"column name {name} is not supported: it begins with #", clause=name)
        return items

    # ---- FROM

    def _from(self, tree: exp.Select, ctes: Ctes) -> tuple[Node, Tables, list[tuple[str, exp.Expr, Scope]]]:
        """Returns the source of a SELECT, its columns by table, and lists to unnest."""
        from_ = tree.args.get("from_")
        if from_ is None:
            raise InvalidStatement("a continuous query needs FROM: the topic that it reads", clause="FROM")
        alias, source = self._table(from_.this, ctes)
        tables: Tables = [(alias, {name.lower(): name for name in source.columns})]
        unnests: list[tuple[str, exp.Expr, Scope]] = []
        for join in tree.args.get("joins") or ():
            if isinstance(join.this, exp.Unnest):
                unnests.append(_unnest(join, tables))
                name, column = unnests[-1][0], join.this.args["alias"].columns[0].name
                tables = [*tables, (join.this.alias, {column.lower(): name})]
                continue
            if unnests:
                raise InvalidStatement("JOIN behind UNNEST is not supported: UNNEST comes last", clause="JOIN")
            right_alias, right = self._table(join.this, ctes)
            times = (event_time(source), event_time(right))
            source, tables = joined(source, tables, join, right_alias, right, times)
        return source, tables, unnests

    def _table(self, item: exp.Expr, ctes: Ctes) -> tuple[str, Node]:
        """Returns the alias and the plan of a table, topic, subquery, CTE or window function."""
        if isinstance(item, exp.Subquery):
            if item.args.get("alias") and item.args["alias"].columns:
                raise InvalidStatement("names of columns behind an alias are not supported", clause="AS")
            return item.alias, self.query(item.this, ctes)
        if not isinstance(item, exp.Table) or not isinstance(item.this, exp.Identifier):
            raise InvalidStatement(f"{item.sql(Verbatim)[:80]} is not supported in FROM", clause="FROM")
        _refuse(item, {"this", "alias", "db", "catalog", "version"}, "FROM")
        alias = item.args.get("alias")
        if alias is not None and alias.columns:
            raise InvalidStatement("names of columns behind an alias are not supported", clause="AS")
        if item.name in self._windows:
            return item.alias or "", self._windowed(self._windows[item.name], ctes)
        if not item.db and item.name.lower() in ctes:
            return item.alias or item.name, ctes[item.name.lower()]
        return item.alias or item.name, self._scan(item)

    def _windowed(self, window: Window, ctes: Ctes) -> Node:
        tree = parse_query(window.table if window.table.startswith("(") else f"SELECT * FROM {window.table}")
        if window.table.startswith("("):
            self._named |= {identifier.name.lower() for identifier in tree.find_all(exp.Identifier)}
            self._has_star = self._has_star or _has_star(tree)
            source = self.query(tree, ctes)
        else:
            _, source = self._table(tree.args["from_"].this, ctes)
        time = window.time.strip('"')
        found = event_time(source)
        if found is None or found[0].lower() != time.lower():
            hint = f"; the watermark is of {found[0]}" if found else ""
            raise InvalidStatement(
                f"{window.function}: {time} has no watermark{hint}: a continuous query needs a declared table with "
                f"WATERMARK FOR {time} AS {time} - INTERVAL '…'",
                clause=window.function,
            )
        return Windowed(source=source, window=window, time_type=found[1])

    def _scan(self, item: exp.Table) -> Node:
        name = item.name
        if item.catalog or (item.db and item.db.lower() != "public"):
            raise InvalidStatement(f"there is no schema {item.db!r}; a name with dots is quoted", clause=item.db)
        table = self._tables.get(name.lower())
        if table is None:
            topic = name if name in self._topics else ""
            alike = [known for known in self._topics if known.lower() == name.lower()]
            if not topic and len(alike) == 1 and not item.this.quoted:
                topic = alike[0]
            if not topic:
                nearest = difflib.get_close_matches(name, [*self._tables, *self._topics], 1) or alike[:1]
                hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
                raise InvalidStatement(f"there is no table or topic {name!r}{hint}", name=name)
            return self._needed(topic, None, COLUMN_NAMES)
        if table.topic not in self._topics:
            raise InvalidStatement(f"table {table.name}: there is no topic {table.topic!r}", name=table.topic)
        hidden = [part for part in COLUMN_NAMES if part in self._named]
        return self._needed(table.topic, table, (*(column.name for column in table.columns), *hidden))

    def _needed(self, topic: str, table: TableDefinition | None, columns: tuple[str, ...]) -> Scan:
        needed = {column for column in columns if self._has_star or column.lower() in self._named}
        if table is not None and table.watermark is not None:
            needed.add(table.watermark[0])  # joins and windows use it unnamed; pruning leaves it out of other plans
        return Scan(topic=topic, table=table, columns=columns, needed=frozenset(needed))


def _has_star(tree: exp.Expr) -> bool:
    return any(
        not (isinstance(star.parent, exp.Anonymous) and star.parent.name.lower() == "count")
        for star in tree.find_all(exp.Star)
    )


# ---- event time


def event_time(node: Node) -> tuple[str, str] | None:
    """Returns name and type of the column that is the event time of a node's rows, None without one. The type is empty
    where the declaration does not say it."""
    match node:
        case Scan(table=table):
            if table is None or table.watermark is None or table.primary_key:
                return None
            column = table.column(table.watermark[0])
            assert column is not None
            return column.name, column.type
        case Select(source=source, items=items):
            found = event_time(source)
            names = [name for name, sql in items if found is not None and sql == quoted(found[0])]
            return (names[0], found[1]) if found is not None and names else None
        case Union(sources=sources):
            times = [event_time(source) for source in sources]
            places = {
                source.columns.index(time[0]) for source, time in zip(sources, times, strict=True) if time is not None
            }
            first = times[0]
            return first if first is not None and None not in times and len(places) == 1 else None
        case Windowed(source=source):
            return event_time(source)
        case TopN(source=source):
            return None
    return None


# ---- parts of a SELECT


def _refuse(tree: exp.Expr, allowed: set[str], where: str) -> None:
    for argument, value in tree.args.items():
        if value and argument not in allowed:
            clause = argument.rstrip("_").upper().replace("ORDER", "ORDER BY")
            raise InvalidStatement(f"{clause} is not supported in {where} of a continuous query", clause=clause)


def _aliases(tree: exp.Select) -> dict[str, exp.Expr]:
    return {item.alias.lower(): item.this for item in tree.expressions if isinstance(item, exp.Alias)}


def _name_of(item: exp.Expr) -> str:
    """Returns the name of a column that has none of its own, as PostgreSQL gives it: of the column, or the function."""
    if isinstance(item, exp.Paren | exp.Cast | exp.TryCast | exp.Filter):
        return _name_of(item.this)
    if isinstance(item, exp.Column | exp.Dot):
        return item.parts[-1].name if isinstance(item, exp.Column) else item.expression.name
    return item.name.lower() if isinstance(item, exp.Anonymous) else ""


def _star(item: exp.Expr, scope: Scope) -> Iterator[tuple[str, exp.Expr]]:
    """Yields the columns of `*` or `table.*`; of a topic that is not declared, without the bytes as they are."""
    star = item.this if isinstance(item, exp.Column) else item
    if any(star.args.get(argument) for argument in ("except_", "except", "replace", "rename")):
        raise InvalidStatement("* with EXCLUDE, REPLACE or RENAME is not supported: name the columns", clause="*")
    of = item.table.lower() if isinstance(item, exp.Column) else ""
    found = [(alias, columns) for alias, columns in scope.tables if not of or alias.lower() == of]
    if not found:
        raise InvalidStatement(f"there is no table {of!r} in FROM", clause=f"{of}.*")
    for alias, columns in found:
        for name in columns:
            parts = [exp.to_identifier(part, quoted=True) for part in ((alias, name) if alias else (name,))]
            # Behind a join or UNNEST the name inside has that of its table before it.
            shown = columns[name].removeprefix("#").removeprefix(f"{alias}.") if alias else columns[name]
            yield shown, exp.Column(this=parts[-1], table=parts[0] if len(parts) > 1 else None)


def _group_keys(tree: exp.Select, items: Sequence[tuple[str, exp.Expr]]) -> list[exp.Expr]:
    group = tree.args.get("group")
    if group is None:
        return []
    _refuse(group, {"expressions", "all"}, "GROUP BY")
    if group.args.get("all"):
        return [item for _, item in items if not has_aggregate(item)]
    keys: list[exp.Expr] = []
    for key in group.expressions:
        if isinstance(key, exp.Column) and key.name.upper() == "ALL" and len(key.parts) == 1 and not key.this.quoted:
            return [item for _, item in items if not has_aggregate(item)]
        if isinstance(key, exp.Literal) and not key.is_string:
            place = int(key.name) if key.name.isdigit() else 0
            if not 1 <= place <= len(items):
                raise InvalidStatement(f"GROUP BY {key.name}: SELECT has {len(items)} columns", clause="GROUP BY")
            keys.append(items[place - 1][1])
        else:
            keys.append(key)
    for key in keys:
        if has_aggregate(key):
            raise InvalidStatement("an aggregate is not supported in GROUP BY", clause="GROUP BY")
    return keys


def _unparenthesised(node: exp.Expr) -> exp.Expr:
    while isinstance(node, exp.Paren):
        node = node.this
    return node


def _split(node: exp.Expr, keys: Mapping[str, str], aggregates: dict[Aggregate, str]) -> exp.Expr:
    """Returns a resolved expression over the names of keys and aggregates. Fills in `aggregates`."""
    name = keys.get(written(_unparenthesised(node)))
    if name is None:
        call = aggregate_of(node)
        if call is not None:
            inner = node.this if isinstance(node, exp.Filter) else node
            condition = [node.args["expression"]] if isinstance(node, exp.Filter) else []
            if any(has_aggregate(argument) for argument in (*inner.expressions, *condition)):
                raise InvalidStatement("an aggregate inside of an aggregate is not supported", clause="aggregate")
            name = aggregates.setdefault(call, f"a{len(aggregates)}")
    if name is not None:
        return exp.Column(this=exp.to_identifier(name, quoted=True))
    if isinstance(node, exp.Column):
        raise InvalidStatement(f"column {node.name} must be in GROUP BY, or inside of an aggregate", clause=node.name)
    node = node.copy()
    for argument, value in list(node.args.items()):
        if isinstance(value, exp.Expr) and not isinstance(value, exp.DataType | exp.Identifier):
            node.set(argument, _split(value, keys, aggregates))
        elif isinstance(value, list):
            node.set(
                argument,
                [_split(part, keys, aggregates) if isinstance(part, exp.Expr) else part for part in value],
            )
    return node


def _unnest(join: exp.Join, tables: Sequence[tuple[str, Mapping[str, str]]]) -> tuple[str, exp.Expr, Scope]:
    unnest = join.this
    alias = unnest.args.get("alias")
    if join.args.get("side") or len(unnest.expressions) != 1 or unnest.args.get("offset"):
        raise InvalidStatement("UNNEST takes one list, as CROSS JOIN UNNEST(list) AS name(column)", clause="UNNEST")
    on = join.args.get("on")
    if on is not None and not (isinstance(on, exp.Boolean) and on.this):
        raise InvalidStatement("UNNEST with ON is not supported: WHERE has the condition", clause="UNNEST")
    if alias is None or len(alias.columns) != 1:
        raise InvalidStatement("UNNEST needs a name for its column: UNNEST(list) AS name(column)", clause="UNNEST")
    return f"#{alias.name}.{alias.columns[0].name}", unnest.expressions[0], Scope(tables)


def _list_of(sql: str) -> str:
    return sql[len("UNNEST(") : -1]


# ---- top-n


def _qualified(condition: exp.Expr, rank: str, window: exp.Expr | None) -> tuple[exp.Expr, int, str]:
    """Returns the window, the limit and the number's name of QUALIFY row_number() OVER (…) <= n."""
    condition = _unparenthesised(condition)
    limit = _limit_of(condition)
    left = _unparenthesised(condition.this) if limit is not None else None
    if limit is not None and isinstance(left, exp.Window):
        # The same window may stand in the SELECT as well, and has a name there.
        named = rank if window is not None and window == left else ""
        if window is not None and not named:
            raise InvalidStatement("QUALIFY and SELECT have different row_number()", clause="QUALIFY")
        return left, limit, named
    if limit is not None and isinstance(left, exp.Column) and window is not None and left.name.lower() == rank.lower():
        return window, limit, rank
    raise InvalidStatement(
        "QUALIFY is supported as row_number() OVER (PARTITION BY … ORDER BY …) <= n", clause="QUALIFY"
    )


def _limit_of(condition: exp.Expr) -> int | None:
    """Returns n of `… <= n`, `… < n + 1` or `… = 1`, None for another condition."""
    if not isinstance(condition, exp.LTE | exp.LT | exp.EQ):
        return None
    number = condition.args["expression"]
    if not isinstance(number, exp.Literal) or number.is_string or not number.name.isdigit():
        return None
    value = int(number.name) - isinstance(condition, exp.LT)
    return None if value < 1 or (isinstance(condition, exp.EQ) and value != 1) else value


def _limited(condition: exp.Expr | None, source: Node) -> tuple[exp.Expr | None, Node]:
    """Returns a condition without the limit of a row_number() of the source, and the source with the limit. Raises
    InvalidStatement if there is none."""
    if not isinstance(source, Select) or not isinstance(source.source, TopN) or source.source.limit >= 0:
        return condition, source
    rank = next(name for name, sql in source.items if sql == quoted("#rank"))
    rest: list[exp.Expr] = []
    limit: int | None = None
    for part in conjuncts(condition):
        found = _limit_of(part)
        left = part.this if found is not None else None
        if found is not None and isinstance(left, exp.Column) and left.name.lower() == rank.lower():
            limit = found if limit is None else min(limit, found)
        else:
            rest.append(part)
    if limit is None:
        raise InvalidStatement(
            f"row_number() needs a limit in the query around it: WHERE {rank} <= n", clause="row_number"
        )
    limited = replace(source, source=replace(source.source, limit=limit))
    return (exp.and_(*rest, copy=True) if rest else None), limited


def _top_n_terms(window: exp.Expr, scope: Scope) -> tuple[tuple[str, ...], tuple[str, ...]]:
    function = window.this
    name = function.name.lower() if isinstance(function, exp.Anonymous) else function.key
    if name not in ("row_number", "rank", "dense_rank"):
        raise InvalidStatement(f"{name} OVER is not supported; row_number() is, in a top-n", clause=name)
    order = window.args.get("order")
    if window.args.get("spec") or order is None:
        raise InvalidStatement("row_number() needs OVER (PARTITION BY … ORDER BY …)", clause="row_number")
    partition = tuple(written(resolved(key, scope)) for key in window.args.get("partition_by") or ())
    terms = []
    for term in order.expressions:
        direction = "DESC" if term.args.get("desc") else "ASC"
        nulls = "FIRST" if term.args.get("nulls_first") else "LAST"
        terms.append(f"{written(resolved(term.this, scope))} {direction} NULLS {nulls}")
    return partition, tuple(terms)
