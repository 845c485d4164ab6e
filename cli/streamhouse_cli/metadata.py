"""Metadata and object store of a platform, for commands that work on both without its services."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamhouse_cli.failures import CliError

if TYPE_CHECKING:
    from shstore.retrying import RetryingStore


@dataclass(frozen=True, slots=True)
class Metadata:
    pg_dsn: str
    store: RetryingStore


@asynccontextmanager
async def metadata_of(data_dir: str | None, config: str | None, *, alone: bool) -> AsyncIterator[Metadata]:
    """Yields the metadata of `streamhouse serve --data-dir`, else of the database in a coordinator's settings. `alone`:
    refuses a directory that is being served. Raises CliError, SettingsError, StoreError."""
    from streamhouse_cli.services import environ_with, load_all_settings
    from streamhouse_cli.store_option import objects_of, store_of

    load_all_settings()
    os.environ.update(environ_with(data_dir=data_dir, config=config))
    directory = objects_of(data_dir) if data_dir is not None else None
    store = store_of("say where the object store is", directory, config, named_by="STREAMHOUSE_STORE_DIR")
    try:
        await store.check()
        async with _database(data_dir, config, alone=alone) as pg_dsn:
            yield Metadata(pg_dsn, store)
    finally:
        await store.close()


@asynccontextmanager
async def _database(data_dir: str | None, config: str | None, *, alone: bool) -> AsyncIterator[str]:
    if data_dir is None:
        from streamhouse_coordinator.settings import CoordinatorSettings

        if not config and "STREAMHOUSE_PG_DSN" not in os.environ:
            raise CliError("say where the metadata is: --data-dir, STREAMHOUSE_PG_DSN or --config")
        yield CoordinatorSettings.load().pg_dsn
        return
    from streamhouse_embedded.data_dir import DataDirError
    from streamhouse_embedded.offline import metadata_database
    from streamhouse_embedded.postgres import PostgresError
    from streamhouse_embedded.settings import EmbeddedSettings

    try:
        async with metadata_database(EmbeddedSettings.load(), alone=alone) as pg_dsn:
            yield pg_dsn
    except (DataDirError, PostgresError) as error:
        raise CliError(str(error)) from error
