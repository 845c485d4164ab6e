"""JOIN of a continuous query to a node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shproto.errors import InvalidStatement
from sqlglot import exp

from streamhouse_sql.core.continuous.nodes import Node


def joined(
    left: Node, tables: Sequence[tuple[str, Mapping[str, str]]], join: exp.Join, alias: str, right: Node
) -> tuple[Node, list[tuple[str, Mapping[str, str]]]]:
    """Returns the join of the sources, and the columns of all its tables. Raises InvalidStatement."""
    raise InvalidStatement("JOIN is not supported in a continuous query yet", clause="JOIN")
