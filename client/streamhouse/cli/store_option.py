"""The object store that a command's options and the environment name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamhouse.cli.failures import CliError

if TYPE_CHECKING:
    from shstore.retrying import RetryingStore


def store_of(question: str, store_dir: str | None, config: str | None) -> RetryingStore:
    """A local directory, or S3 by STREAMHOUSE_S3_*. Raises CliError that begins with `question` when neither is
    named; SettingsError, StoreError."""
    from shruntime.settings import StoreSettings
    from shstore.configured import configured_store

    from streamhouse.cli.services import environ_with, load_all_settings

    load_all_settings()
    environ = environ_with(store_dir=store_dir, config=config)
    settings = StoreSettings.load(environ)
    if not (settings.store_dir or config or any(name.startswith("STREAMHOUSE_S3_") for name in environ)):
        raise CliError(f"{question}: --data-dir (of `streamhouse serve`), --store-dir or STREAMHOUSE_S3_*")
    return configured_store(settings)
