"""Nodes to a program: statements of DuckDB's SQL that compute the change of a result in a micro-batch.

Each node becomes a SELECT of the change of its rows, over the decoded inputs (`in_…`), tables of this micro-batch
(`d_…`) and state (`s_…`). Nodes without state are only a SELECT around another, so that DuckDB plans them together.
A change has rows that are new; of a changelog also rows that are no longer there, told apart by their weight.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from shproto.errors import InvalidStatement

from streamhouse_sql.core.columns import COLUMN_NAMES
from streamhouse_sql.core.continuous.build import Builder, Options, Relation, kept_result, listed
from streamhouse_sql.core.continuous.event_time import Below, bare, hidden_of, in_windows, names_window, window_below
from streamhouse_sql.core.continuous.groups import at_once, closed, grouped
from streamhouse_sql.core.continuous.model import (
    INPUT,
    OFFSET,
    PARTITION,
    TIME,
    WEIGHT,
    JobInput,
    Program,
    SourceProgram,
    StateInfo,
)
from streamhouse_sql.core.continuous.nodes import Group, Join, Node, Scan, Select, TopN, Union, Windowed, sources_of
from streamhouse_sql.core.continuous.pairs import pairs
from streamhouse_sql.core.continuous.sessions import sessions
from streamhouse_sql.core.continuous.top_n import top_n
from streamhouse_sql.core.continuous.upserts import DEAD, upserts
from streamhouse_sql.core.quoting import quoted
from streamhouse_sql.core.tables import BINARY_FORMATS, decodes_in_arrow, needed_columns, record_columns_of, select_of

# Hidden columns of a relation whose rows are records: the place that breaks ties.
_PLACE = (INPUT, PARTITION, OFFSET)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """A program, and what the plan says about it."""

    program: Program
    inputs: tuple[JobInput, ...]
    columns: tuple[str, ...]
    key: tuple[str, ...]
    is_changelog: bool
    state: tuple[StateInfo, ...]
    operators: tuple[str, ...]
    fingerprint: str


def compiled(node: Node, topics: Mapping[str, int], options: Options) -> Compiled:
    """Returns the program of a plan. Raises InvalidStatement for a combination of nodes that has none."""
    return _Compiler(node, topics, options).compile(node)


class _Compiler:
    """Collects the statements of a program, sources first."""

    def __init__(self, node: Node, topics: Mapping[str, int], options: Options) -> None:
        self._topics = topics
        self._builder = Builder(options=options)
        self._sources: dict[tuple[str, str], SourceProgram] = {}
        self._inputs: dict[str, set[str]] = {}
        self._root = node
        self._result = ""
        nodes = _all_nodes(node)
        self._uses = Counter(id(found) for found in nodes)
        self._reads = Counter(_key_of(found) for found in nodes if isinstance(found, Scan))
        self._shared: dict[int, Relation] = {}
        self._uses_time = any(
            isinstance(found, Windowed) or (isinstance(found, Join) and (found.interval or found.as_of))
            for found in nodes
        )
        self._needs_order = any(
            isinstance(found, Group) and any(call.is_ordered for _, call in found.aggregates) for found in nodes
        )
        self._scans = _needed_by_scan(nodes)

    def compile(self, node: Node) -> Compiled:
        """Returns the program of the node's result."""
        result = self.relation(node)
        if self._builder.options.emit_on_close and not result.is_final:
            raise InvalidStatement(
                "EMIT ON WINDOW CLOSE needs GROUP BY over TUMBLE, HOP, CUMULATE or SESSION",
                clause="EMIT ON WINDOW CLOSE",
            )
        names = self._builder.options.renamed or result.columns
        if self._builder.options.renamed:
            if len(names) != len(result.columns):
                raise InvalidStatement(
                    f"INSERT names {len(names)} columns, and the query has {len(result.columns)}", clause="INSERT"
                )
            result = _renamed(result, names)
        output, view = self._output(result)
        if self._builder.options.ttl_us and not self._builder.expiries:
            raise InvalidStatement(
                "state_ttl has no effect: the query keeps no state that is forgotten when it does not change",
                clause="state_ttl",
            )
        program = Program(
            sources=tuple(self._sources.values()),
            ops=tuple(self._builder.ops),
            output=output,
            output_guard=result.guard,
            states=tuple(info.table for info in self._builder.states),
            view=view,
            expiries=tuple(self._builder.expiries),
            compactions=tuple(self._builder.compactions),
        )
        inputs = tuple(
            JobInput(
                name=topic,
                topic=topic,
                columns=tuple(column for column in COLUMN_NAMES if column in needed),
                has_watermark=any(source.watermark and source.input == topic for source in self._sources.values()),
            )
            for topic, needed in self._inputs.items()
        )
        return Compiled(
            program=program,
            inputs=inputs,
            columns=result.columns,
            key=result.key or (),
            is_changelog=result.is_changelog,
            state=tuple(self._builder.states),
            operators=tuple(self._builder.operators),
            fingerprint=hashlib.sha256(repr((program, inputs, self._builder.options)).encode()).hexdigest()[:32],
        )

    # ---- nodes

    def relation(self, node: Node) -> Relation:
        """Returns the change of a node's rows. A node that is used twice is computed once."""
        if id(node) in self._shared:
            return self._shared[id(node)]
        match node:
            case Scan():
                found = self._scan(node)
            case Select():
                found = self._select(node)
            case Union():
                found = self._union(node)
            case Windowed():
                found = self._windowed(node, is_bare=False)
            case Group():
                found = self._group(node)
            case TopN():
                found = self._top_n(node)
            case Join():
                found = pairs(self._builder, node, self.relation(node.left), self.relation(node.right))
            case _:
                raise InvalidStatement(f"{type(node).__name__} is not supported in a continuous query")
        if self._uses[id(node)] > 1 and not isinstance(node, Scan):
            found = self._builder.kept(found)
        self._shared[id(node)] = found
        return found

    def _scan(self, node: Scan) -> Relation:
        key = _key_of(node)
        source = self._sources.get(key)
        if source is None:
            source = self._source(node, key)
            self._sources[key] = source
        self._builder.operators.append(
            f"scan of topic {node.topic}" + (f" as table {node.table.name}" if node.table else "")
        )
        hidden = [*_PLACE, *((TIME,) if self._needs_order else ())]
        from_ = source.table or f"({source.decode})"
        columns = tuple(column for column in node.columns if column in self._scans[key])
        if node.table is not None and node.table.primary_key:
            place = listed([*columns, PARTITION, OFFSET, DEAD])
            return upserts(self._builder, node.table, f"SELECT {place} FROM {from_}", columns)
        shown = ", ".join(quoted(name) for name in (*columns, *hidden))
        return Relation(
            sql=f"SELECT {shown} FROM {from_}",
            columns=columns,
            hidden=tuple(hidden),
            is_ordered=True,
            has_places=node.table is None or node.table.csv is None,  # a record of CSV may have several rows
        )

    def _source(self, node: Scan, key: tuple[str, str]) -> SourceProgram:
        needed = self._scans[key]
        number = len(self._sources)
        raw, table = f"raw_{number}", node.table
        parts = [name for name in COLUMN_NAMES if name in needed or name in ("_partition", "_offset")]
        place = [
            f"{number} AS {quoted(INPUT)}",
            f'"_partition" AS {quoted(PARTITION)}',
            f'"_offset" AS {quoted(OFFSET)}',
        ]
        # A row that is replaced has no time of its own.
        has_time = table is not None and not table.primary_key
        watermark = table.watermark if table is not None and has_time and self._uses_time else None
        if table is not None and table.watermark is not None and (watermark or self._needs_order):
            needed = needed | {table.watermark[0]}
        if self._needs_order:
            time = quoted(table.watermark[0]) if table is not None and table.watermark else '"_timestamp"'
            place.append(f"epoch_us({time}) AS {quoted(TIME)}")
            if not (table is not None and table.watermark):
                parts = [name for name in COLUMN_NAMES if name in {*parts, "_timestamp"}]
        if table is None:
            shown = [quoted(name) for name in parts if name in needed]
            decode = f"SELECT {', '.join([*shown, *place])} FROM {raw}"
            record_columns: Sequence[str] = parts
            fields, hidden = [], []
        else:
            fields = needed_columns(table, {name.lower() for name in needed})
            hidden = [name for name in parts if name not in {column.name for column in table.columns}]
            shown = [quoted(name) for name in needed if name not in COLUMN_NAMES] + [
                quoted(name) for name in parts if name in needed
            ]
            if table.primary_key:
                value = "_value_bytes" if decodes_in_arrow(table) else "_value"
                hidden += [value] if value not in hidden else []
                place.append(f"{quoted(value)} IS NULL AS {quoted(DEAD)}")
            inner = select_of(table, raw, fields, hidden, is_upsert=False)
            decode = f"SELECT {', '.join([*sorted(shown), *place])} FROM ({inner})"
            record_columns = record_columns_of(table, fields, hidden)
        self._inputs.setdefault(node.topic, set()).update({*record_columns, "_partition", "_offset"})
        counts = table is not None and table.bad_rows == "skip"
        binary = table if table is not None and table.format in BINARY_FORMATS else None
        return SourceProgram(
            name=table.name if table is not None else node.topic,
            input=node.topic,
            raw=raw,
            topic=node.topic,
            decode=decode,
            table=f"in_{number}" if watermark or counts or self._reads[key] > 1 else "",
            watermark=f"epoch_us({watermark[1]})" if watermark else "",
            time=f"epoch_us({quoted(watermark[0])})" if watermark else "",
            counts_bad_rows=counts,
            partitions=self._topics[node.topic],
            binary=binary,
            fields=tuple(fields),
            hidden=tuple(hidden),
        )

    def _select(self, node: Select) -> Relation:
        return self._selected(node, self.relation(node.source))

    def _selected(self, node: Select, source: Relation) -> Relation:
        from_ = f"({source.sql})"
        for name, lists in node.unnests:
            from_ = f"(SELECT *, unnest({lists}) AS {quoted(name)} FROM {from_})"
        rest = [quoted(name) for name in source.all_columns() if name not in source.columns]
        items = [f"{sql} AS {quoted(name)}" for name, sql in node.items]
        where = f" WHERE {node.where}" if node.where else ""
        # A key that is still shown, under whichever name, still identifies a row.
        shown = {sql: name for name, sql in reversed(node.items)}
        key = None
        if source.key is not None and not node.unnests and all(quoted(name) in shown for name in source.key):
            key = tuple(shown[quoted(name)] for name in source.key)
        return replace(
            source,
            sql=f"SELECT {', '.join([*items, *rest])} FROM {from_}{where}",
            columns=node.columns,
            key=key,
            has_places=source.has_places and not node.unnests,
            sort=tuple(shown[quoted(name)] for name in source.sort if quoted(name) in shown),
            windows={shown[quoted(name)]: of for name, of in source.windows.items() if quoted(name) in shown},
        )

    def _windowed(self, node: Windowed, *, is_bare: bool) -> Relation:
        source = self.relation(node.source)
        if not is_bare and node.window.function == "SESSION":
            raise InvalidStatement("SESSION without GROUP BY is not supported in a continuous query", clause="SESSION")
        if source.is_changelog:
            raise InvalidStatement(
                f"{node.window.function} over rows that may change is not supported", clause=node.window.function
            )
        return replace(
            source,
            sql=bare(source.sql, node) if is_bare else in_windows(source.sql, node),
            columns=node.columns,
            hidden=(*source.hidden, *hidden_of(node, is_bare=is_bare)),
            has_places=source.has_places and (is_bare or node.window.function == "TUMBLE"),
        )

    def _group(self, node: Group) -> Relation:
        below = window_below(node.source)
        on_close = self._builder.options.emit_on_close
        if below is None:
            source = self.relation(node.source)
            if on_close and source.windows:
                return at_once(self._builder, node, source)
            if on_close:
                raise InvalidStatement(
                    "EMIT ON WINDOW CLOSE needs GROUP BY over TUMBLE, HOP, CUMULATE or SESSION",
                    clause="EMIT ON WINDOW CLOSE",
                )
            return self._kept_group(node, source, None)
        function = below.node.window.function
        is_session = function == "SESSION"
        names_window_ = names_window(node.source)
        if is_session and names_window_:
            raise InvalidStatement("columns of a SESSION are supported in GROUP BY and SELECT", clause="SESSION")
        is_sliced = on_close and not is_session and function != "TUMBLE" and not names_window_
        source = self._above(node.source, is_bare=is_sliced or is_session)
        if is_session:
            return sessions(self._builder, node, source, below)
        if on_close:
            return closed(self._builder, node, source, below, is_sliced=is_sliced)
        return self._kept_group(node, source, below)

    def _top_n(self, node: TopN) -> Relation:
        below = window_below(node.source)
        end = ""
        if below is not None:
            names = {of: name for name, of in below.names.items() if quoted(name) in node.partition}
            if "window_end" in names:
                end = f"epoch_us({quoted(names['window_end'])})"
            elif "window_start" in names and below.node.window.function in ("TUMBLE", "HOP"):
                end = f"epoch_us({quoted(names['window_start'])}) + {below.node.window.sizes['SIZE']}"
        return top_n(self._builder, node, self.relation(node.source), end)

    def _kept_group(self, node: Group, source: Relation, below: Below | None) -> Relation:
        """Returns the group's changes. The state is the result of a view that shows nothing else."""
        is_result = self._builder.options.is_view and node is self._root
        found, view = grouped(self._builder, node, source, below, keeps_windows=is_result)
        if is_result:
            self._result = view
        return found

    def _above(self, node: Node, *, is_bare: bool) -> Relation:
        """Returns the change of a node without state above windows."""
        if isinstance(node, Windowed):
            return self._windowed(node, is_bare=is_bare)
        assert isinstance(node, Select)
        return self._selected(node, self._above(node.source, is_bare=is_bare))

    def _union(self, node: Union) -> Relation:
        sides = [self.relation(source) for source in node.sources]
        self._builder.operators.append("union all")
        names = sides[0].columns
        hidden = [name for name in sides[0].hidden if all(name in side.hidden for side in sides)]
        is_changelog = any(side.is_changelog for side in sides)
        parts = []
        for side in sides:
            shown = [f"{quoted(own)} AS {quoted(name)}" for own, name in zip(side.columns, names, strict=True)]
            shown += [quoted(name) for name in hidden]
            if is_changelog:
                shown.append(quoted(WEIGHT) if side.is_changelog else f"1 AS {quoted(WEIGHT)}")
            parts.append(f"SELECT {', '.join(shown)} FROM ({side.sql})")
        guards = {side.guard for side in sides}
        return Relation(
            sql=" UNION ALL ".join(parts),
            columns=names,
            hidden=tuple(hidden),
            is_changelog=is_changelog,
            guard=guards.pop() if len(guards) == 1 else None,
            is_ordered=all(side.is_ordered for side in sides),
            is_final=all(side.is_final for side in sides),
        )

    # ---- result

    def _output(self, result: Relation) -> tuple[str, str]:
        """Returns the SELECT of the result's change, in its order, and that of the whole result if it is kept."""
        shown = listed(result.columns)
        if result.is_changelog:
            shown = f'CAST({quoted(WEIGHT)} AS TINYINT) AS "_op", {shown}'
        order = _order_of(result)
        if not self._builder.options.is_view:
            return f"SELECT {shown} FROM ({result.sql}){order}", ""
        if self._result:
            return f"SELECT {shown} FROM ({result.sql}){order}", self._result
        change = self._builder.kept(result)
        view = kept_result(self._builder, change)
        return f"SELECT {shown} FROM ({change.sql}){order}", view


def _order_of(result: Relation) -> str:
    """Returns ORDER BY of a result: windows, keys, and what is no longer there before what is new. Rows of records come
    in the order of these, and need none."""
    if result.is_ordered:
        return ""
    # Without a key all columns together tell rows apart.
    rest = [] if result.key is not None else [name for name in result.columns if name not in result.sort]
    weight = [WEIGHT] if result.is_changelog else []
    terms = [*result.sort, *(rest if result.key is None else []), *weight]
    return f" ORDER BY {listed(terms)}" if terms else ""


def _all_nodes(node: Node) -> list[Node]:
    """Returns the nodes of a plan; one that is used twice comes twice."""
    found: list[Node] = [node]
    for source in sources_of(node):
        found += _all_nodes(source)
    return found


def _key_of(node: Scan) -> tuple[str, str]:
    """Returns what scans of the same decoded input have in common: the topic, and the table."""
    return node.topic, node.table.name.lower() if node.table else ""


def _needed_by_scan(nodes: Sequence[Node]) -> dict[tuple[str, str], frozenset[str]]:
    needed: dict[tuple[str, str], frozenset[str]] = {}
    for node in nodes:
        if isinstance(node, Scan):
            key = _key_of(node)
            keys = node.table.primary_key if node.table is not None else ()
            needed[key] = needed.get(key, frozenset()) | node.needed | set(keys)
    return needed


def _renamed(relation: Relation, names: Sequence[str]) -> Relation:
    given = dict(zip(relation.columns, names, strict=True))
    rest = [quoted(name) for name in relation.all_columns() if name not in relation.columns]
    items = [f"{quoted(name)} AS {quoted(given[name])}" for name in relation.columns]
    return replace(
        relation,
        sql=f"SELECT {', '.join([*items, *rest])} FROM ({relation.sql})",
        columns=tuple(names),
        key=tuple(given[name] for name in relation.key) if relation.key is not None else None,
        sort=tuple(given[name] for name in relation.sort),
        windows={given[name]: of for name, of in relation.windows.items()},
    )
