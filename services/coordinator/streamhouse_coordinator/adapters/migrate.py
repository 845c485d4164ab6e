"""Brings a database to the tables this version works with. Two coordinators may start at the same time.

Migrations are only ever added. One that was changed afterwards would leave every database that had it already
different from a new one: a test holds their hashes.
"""

from importlib import resources
from typing import Any

from streamhouse_coordinator.adapters import migrations

# Any number will do, as long as no other program takes the same advisory lock in this database ("sh" + "mig").
MIGRATION_LOCK = 0x73686D6967


class DatabaseTooNew(RuntimeError):
    """The database was migrated by a newer version; this one must not touch it."""


def available() -> dict[str, str]:
    """SQL by migration name, in order."""
    files = (item for item in resources.files(migrations).iterdir() if item.name.endswith(".sql"))
    return {item.name.removesuffix(".sql"): item.read_text() for item in sorted(files, key=lambda item: item.name)}


async def migrate(connection: Any) -> list[str]:
    """Applies what is missing, all of it or nothing; returns the names. Waits for others that migrate. Raises
    DatabaseTooNew."""
    # One transaction, so that a pooler may lie in between: a lock of the session would stay with another's connection.
    # It takes as long as it takes, whatever limits the user or the database have.
    async with connection.transaction():
        for limit in ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"):
            await connection.execute(f"SET LOCAL {limit} = 0")
        return await _migrate(connection)


async def _migrate(connection: Any) -> list[str]:
    await connection.execute("SELECT pg_advisory_xact_lock($1)", MIGRATION_LOCK)
    await connection.execute(
        "CREATE TABLE IF NOT EXISTS migrations (name text PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT now())"
    )
    done = {row["name"] for row in await connection.fetch("SELECT name FROM migrations")}
    known = available()
    if unknown := done - set(known):
        raise DatabaseTooNew(f"the database has migrations this version does not know: {', '.join(sorted(unknown))}")
    missing = [name for name in known if name not in done]
    for name in missing:
        await connection.execute(known[name])
        await connection.execute("INSERT INTO migrations (name) VALUES ($1)", name)
    return missing
