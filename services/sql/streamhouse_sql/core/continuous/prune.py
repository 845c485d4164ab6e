"""Columns that nothing uses are left out of a plan: what `SELECT *` of a subquery names is not decoded, nor kept."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import replace

from streamhouse_sql.core.continuous.aggregates import Aggregate
from streamhouse_sql.core.continuous.nodes import Group, Join, Node, Scan, Select, TopN, Union, Windowed, sources_of

_QUOTED = re.compile(r'"((?:[^"]|"")*)"')


def pruned(node: Node, used: Collection[str] | None = None) -> Node:
    """Returns the plan with the columns that are used. `used` None: all. A node that is used twice is still one."""
    return _Pruner(node).node(node, None if used is None else frozenset(used))


class _Pruner:
    """Prunes nodes that one other uses; nodes that several use keep all of their columns, and stay one."""

    def __init__(self, root: Node) -> None:
        self._counts: dict[int, int] = {}
        self._done: dict[int, Node] = {}
        self._count(root)

    def _count(self, node: Node) -> None:
        self._counts[id(node)] = self._counts.get(id(node), 0) + 1
        for source in sources_of(node):
            self._count(source)

    def node(self, node: Node, used: frozenset[str] | None) -> Node:
        """Returns the node with these columns."""
        if self._counts[id(node)] > 1:
            if id(node) not in self._done:
                self._done[id(node)] = self._pruned(node, None)
            return self._done[id(node)]
        return self._pruned(node, used)

    def _pruned(self, node: Node, used: frozenset[str] | None) -> Node:
        match node:
            case Scan():
                return node if used is None else replace(node, needed=node.needed & used)
            case Select():
                items = tuple((name, sql) for name, sql in node.items if used is None or name in used)
                # A row without columns is still a row.
                items = items or node.items[:1]
                texts = [sql for _, sql in items] + [node.where] + [sql for _, sql in node.unnests]
                return replace(node, items=items, source=self.node(node.source, _names(texts)))
            case Windowed():
                inner = None if used is None else used | _names([node.window.time, *node.window.keys])
                return replace(node, source=self.node(node.source, inner))
            case Group():
                texts = [sql for _, sql in node.keys]
                for _, call in node.aggregates:
                    texts += _texts(call)
                return replace(node, source=self.node(node.source, _names(texts)))
            case TopN():
                inner = None if used is None else used | _names([*node.partition, *node.order])
                return replace(node, source=self.node(node.source, inner))
            case Join():
                return self._join(node, used)
            case Union():
                return replace(node, sources=tuple(self.node(source, None) for source in node.sources))

    def _join(self, node: Join, used: frozenset[str] | None) -> Node:
        if used is None:
            return replace(node, left=self.node(node.left, None), right=self.node(node.right, None))
        texts = [node.where, *(sql for keys in node.keys for sql in keys)]
        inner = used | _names(texts) | set(node.times)
        sides = []
        names = []
        for side, given in zip((node.left, node.right), node.names, strict=True):
            kept = [(column, name) for column, name in zip(side.columns, given, strict=True) if name in inner]
            new = self.node(side, frozenset(column for column, _ in kept))
            named = dict(zip(side.columns, given, strict=True))
            sides.append(new)
            names.append(tuple(named[column] for column in new.columns))
        return replace(node, left=sides[0], right=sides[1], names=(names[0], names[1]))


def _texts(call: Aggregate) -> list[str]:
    return [*call.arguments, call.where]


def _names(texts: Iterable[str]) -> frozenset[str]:
    """Returns all quoted names in SQL: those of columns, and perhaps others, which changes nothing."""
    return frozenset(name.replace('""', '"') for text in texts for name in _QUOTED.findall(text))
