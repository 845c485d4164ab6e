"""Declares and drops tables for SQL."""

from shproto.events import SqlTableCreated

from streamhouse_coordinator.core import sql_tables
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.ports import Transaction, where
from streamhouse_coordinator.service.common import Context

# Two creations of a name must not both see that it is free, and the number of tables has a limit.
SQL_LOCK = "sql"


async def create_sql_table(context: Context, table: str, definition: str) -> t.SqlTableRow:
    """Declares a table and returns its row. Raises InvalidArgument, TableExists, Overloaded."""
    sql_tables.check_create(table, definition)
    table_id = context.new_id().replace("-", "")

    async def work(tx: Transaction) -> t.SqlTableRow:
        same_name = await tx.select(t.SQL_TABLES, where(table_name=table))
        has_view = bool(await tx.select(t.SQL_JOBS, where(job=table, kind=t.VIEW)))
        count = (await tx.totals(t.SQL_TABLES, where()))[0].count
        asked = SqlTableCreated(table_id=table_id, table=table, definition=definition, created_ms=await tx.now_ms())
        await tx.append([sql_tables.create(asked, same_name, has_view, count, context.settings.sql_tables_max)])
        return (await tx.select(t.SQL_TABLES, where(table_name=table)))[0]

    return await context.store.run(work, lock=SQL_LOCK)


async def drop_sql_table(context: Context, table: str) -> str:
    """Drops a table's declaration and returns its id. Raises UnknownTable."""

    async def work(tx: Transaction) -> str:
        rows = await tx.select(t.SQL_TABLES, where(table_name=table))
        event = sql_tables.drop(table, rows, await tx.now_ms())
        await tx.append([event])
        return event.table_id

    return await context.store.run(work, lock=SQL_LOCK)
