"""The embedded platform's PostgreSQL for commands that work on the metadata itself: backups and restores."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from streamhouse_embedded.data_dir import DataDir, DataDirError
from streamhouse_embedded.postgres import EmbeddedPostgres
from streamhouse_embedded.settings import EmbeddedSettings


@asynccontextmanager
async def metadata_database(settings: EmbeddedSettings, *, alone: bool) -> AsyncIterator[str]:
    """Yields the DSN of the database of `settings.data_dir`, started for the `with` block if no process serves the
    directory.

    `alone`: refuse a directory that is served. Raises DataDirError, PostgresError.
    """
    data_dir = DataDir(settings.data_dir)
    postgres = EmbeddedPostgres(data_dir.postgres, bin_dir=settings.pg_bin_dir or None)
    try:
        data_dir.lock()
    except DataDirError:
        if alone:
            raise
        yield settings.pg_dsn or postgres.running_dsn()
        return
    try:
        if settings.pg_dsn:
            yield settings.pg_dsn
            return
        try:
            yield await postgres.start()
        finally:
            await postgres.stop()
    finally:
        data_dir.unlock()
