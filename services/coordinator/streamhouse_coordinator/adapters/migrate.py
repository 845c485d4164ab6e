"""Brings a database to the tables this version works with. Two coordinators may start at the same time."""

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
    """Applies what is missing, each migration with its record in one transaction; returns their names.

    Waits for others that migrate. After an error the caller closes the connection, and the lock goes with it: giving it
    back takes an answer from a server that may have none.
    """
    await connection.execute("SELECT pg_advisory_lock($1)", MIGRATION_LOCK)
    await connection.execute(
        "CREATE TABLE IF NOT EXISTS migrations (name text PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT now())"
    )
    done = {row["name"] for row in await connection.fetch("SELECT name FROM migrations")}
    known = available()
    if unknown := done - set(known):
        raise DatabaseTooNew(f"the database has migrations this version does not know: {', '.join(sorted(unknown))}")
    missing = [name for name in known if name not in done]
    for name in missing:
        async with connection.transaction():
            await connection.execute(known[name])
            await connection.execute("INSERT INTO migrations (name) VALUES ($1)", name)
    await connection.execute("SELECT pg_advisory_unlock($1)", MIGRATION_LOCK)
    return missing
