"""Declared tables and topics, as statements find them by name.

Owns: definitions parsed from the index, by table id. Does not own: the index, the coordinator's rows.
Invariants: a table that this service created or dropped is known, or unknown, to its next statement. A definition that
does not parse, as one of a newer version may not, hides its table and no other.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from shproto.errors import InvalidStatement, StreamHouseError, TableExists, UnknownTable
from shproto.services import CoordinatorApi
from shproto.v1 import coordinator_pb2
from shread.reads import Reads

from streamhouse_sql.core.statement import CreateTable, parse
from streamhouse_sql.core.tables import TableDefinition

log = logging.getLogger(__name__)


class Catalog:
    """Names of topics and tables. Raises Unavailable before the first snapshot of the index."""

    def __init__(self, reads: Reads, coordinator: CoordinatorApi) -> None:
        self._reads = reads
        self._coordinator = coordinator
        self._parsed: dict[str, TableDefinition | None] = {}

    def topics(self) -> Mapping[str, int]:
        """Returns the number of partitions by name of the topic."""
        return {name: entry.partitions for name, entry in self._reads.index.topics().items()}

    def tables(self) -> Mapping[str, TableDefinition]:
        """Returns the declared tables by name in small letters."""
        known = self._reads.index.sql_tables()
        for gone in self._parsed.keys() - {table.table_id for table in known.values()}:
            del self._parsed[gone]
        found = {}
        for name, table in known.items():
            if table.table_id not in self._parsed:
                self._parsed[table.table_id] = _parsed(table.definition)
            definition = self._parsed[table.table_id]
            if definition is not None:
                found[name] = definition
        return found

    async def refresh(self) -> None:
        """Returns once the index knows all that the coordinator knew before the call. Raises Unavailable."""
        await self._reads.index_catch_up.catch_up_to_head()

    async def create(self, statement: CreateTable) -> None:
        """Declares a table. Raises TableExists unless the statement says IF NOT EXISTS."""
        definition = statement.definition
        request = coordinator_pb2.CreateSqlTableRequest(table=definition.name.lower(), definition=definition.text)
        try:
            await self._coordinator.create_sql_table(request)
        except TableExists:
            if not statement.if_not_exists:
                raise
        await self.refresh()

    async def drop(self, name: str, *, if_exists: bool) -> None:
        """Drops a table's declaration. Raises UnknownTable unless `if_exists`."""
        try:
            await self._coordinator.drop_sql_table(coordinator_pb2.DropSqlTableRequest(table=name.lower()))
        except UnknownTable:
            if not if_exists:
                raise
        await self.refresh()


def tables_of(definitions: Sequence[str]) -> dict[str, TableDefinition]:
    """Returns tables by name in small letters, of the definitions that a job keeps. Raises InvalidStatement for one
    that cannot be read."""
    found = {}
    for text in definitions:
        statement = parse(text)
        if not isinstance(statement, CreateTable):
            raise InvalidStatement(f"the definition of a table is no CREATE TABLE: {text[:200]}")
        found[statement.definition.name.lower()] = statement.definition
    return found


def _parsed(text: str) -> TableDefinition | None:
    try:
        statement = parse(text)
    except StreamHouseError as error:
        log.error("the definition of a table cannot be read, and the table is hidden: %s: %.200s", error, text)
        return None
    if not isinstance(statement, CreateTable):
        log.error("the definition of a table is no CREATE TABLE, and the table is hidden: %.200s", text)
        return None
    return statement.definition
