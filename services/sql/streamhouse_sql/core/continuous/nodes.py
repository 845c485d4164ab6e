"""Nodes of a plan: what a continuous query computes, before it is known how.

Expressions are SQL over the names that columns have in the node's source; a node says its own columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamhouse_sql.core.continuous.aggregates import Aggregate
from streamhouse_sql.core.quoting import quoted
from streamhouse_sql.core.tables import TableDefinition
from streamhouse_sql.core.windows import Window


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """Rows of a topic, decoded as a declared table has them, or as they are. `needed`: the columns that are used."""

    topic: str
    table: TableDefinition | None
    columns: tuple[str, ...]
    needed: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Select:
    """Rows of a source for which `where` is true, with (name, expression) columns. `unnests`: (name, list): a row for
    each element of the list."""

    source: Node
    items: tuple[tuple[str, str], ...]
    where: str = ""
    unnests: tuple[tuple[str, str], ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(name for name, _ in self.items)


@dataclass(frozen=True, slots=True, kw_only=True)
class Windowed:
    """Rows of a source in the windows of their event time."""

    source: Node
    window: Window
    time_type: str

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the source's columns and the window's."""
        return (*self.source.columns, *WINDOW_COLUMNS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Aggregates of a source's rows by keys. `keys`: (name, expression), `aggregates`: calls by name; `items` and
    `having` are expressions over these names."""

    source: Node
    keys: tuple[tuple[str, str], ...]
    aggregates: tuple[tuple[str, Aggregate], ...]
    items: tuple[tuple[str, str], ...]
    having: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(name for name, _ in self.items)


@dataclass(frozen=True, slots=True, kw_only=True)
class TopN:
    """The first `limit` rows of each partition of a source. `order`: terms of ORDER BY. `rank`: name of the column with
    the row's number, empty without one. `function`: row_number, rank or dense_rank."""

    source: Node
    partition: tuple[str, ...]
    order: tuple[str, ...]
    limit: int
    rank: str = ""
    function: str = "row_number"

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        return (*self.source.columns, self.rank) if self.rank else self.source.columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Union:
    """Rows of several sources, column by column."""

    sources: tuple[Node, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the first source's columns."""
        return self.sources[0].columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """Pairs of rows. `keys`: (left, right) expressions that are equal; `where`: the rest of the condition, over both
    sides' columns. `names`: of the left side's and then the right side's columns behind the join. `times`: their event
    times, empty without. `interval`: (least, greatest) right time less left time in us, of an interval join. `as_of`:
    left time column of a temporal join; `is_outer`: of it, rows without a partner are kept."""

    left: Node
    right: Node
    keys: tuple[tuple[str, str], ...]
    where: str
    names: tuple[tuple[str, ...], tuple[str, ...]]
    times: tuple[str, str] = ("", "")
    interval: tuple[int, int] | None = None
    as_of: str = ""
    is_outer: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns of both sides."""
        return (*self.names[0], *self.names[1])


Node = Scan | Select | Windowed | Group | TopN | Union | Join
WINDOW_COLUMNS = ("window_start", "window_end", "window_time")


def sources_of(node: Node) -> Sequence[Node]:
    """Returns the nodes that a node reads."""
    if isinstance(node, Scan):
        return ()
    if isinstance(node, Union):
        return node.sources
    if isinstance(node, Join):
        return (node.left, node.right)
    return (node.source,)


def identity(node: Node) -> tuple[tuple[str, str], ...]:
    """Returns the columns of a node as items of a Select around it; of a scan those that are needed."""
    if isinstance(node, Windowed):
        return (*identity(node.source), *((name, f'"{name}"') for name in WINDOW_COLUMNS))
    if isinstance(node, Join):
        needed = [{name for name, _ in identity(side)} for side in (node.left, node.right)]
        return tuple(
            (name, quoted(name))
            for side, names, known in zip((node.left, node.right), node.names, needed, strict=True)
            for column, name in zip(side.columns, names, strict=True)
            if column in known
        )
    columns = [name for name in node.columns if not isinstance(node, Scan) or name in node.needed]
    return tuple((name, quoted(name)) for name in columns)
