"""The object store that a command's options and the environment name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from streamhouse_cli.failures import CliError

if TYPE_CHECKING:
    from shstore.retrying import RetryingStore


OBJECTS_DIR = "objects"
"""The object store in the data directory of an embedded platform."""


STORED_DIR = "objects"
"""What a local object store keeps the objects in."""


def objects_of(data_dir: str) -> str:
    """Returns the directory of the object store in the data directory of `streamhouse serve`. Raises CliError for any
    other directory, in which the store would make its own directories."""
    if not (Path(data_dir) / OBJECTS_DIR).is_dir():
        raise CliError(f"{data_dir} is no data directory of `streamhouse serve`: it has no directory {OBJECTS_DIR}")
    return str(Path(data_dir) / OBJECTS_DIR)


def store_of(
    question: str, store_dir: str | None, config: str | None, *, named_by: str = "--store-dir"
) -> RetryingStore:
    """Returns the store in a local directory, or the bucket of STREAMHOUSE_S3_*. Raises CliError that begins with
    `question` if neither is named, and for a directory without a store; SettingsError, StoreError. `named_by`: the
    option or variable with which the command's user names a directory."""
    from shstore.open import configured_store
    from shstore.settings import StoreSettings

    from streamhouse_cli.services import environ_with, load_all_settings

    load_all_settings()
    environ = environ_with(store_dir=store_dir, config=config)
    settings = StoreSettings.load(environ)
    if not (settings.store_dir or config or any(name.startswith("STREAMHOUSE_S3_") for name in environ)):
        raise CliError(f"{question}: --data-dir (of `streamhouse serve`), {named_by} or STREAMHOUSE_S3_*")
    # Commands work on directories that services have made. In any other the store would create its own at a request.
    if settings.store_dir and not (Path(settings.store_dir) / STORED_DIR).is_dir():
        raise CliError(f"{settings.store_dir} is no object store of StreamHouse: it has no directory {STORED_DIR}")
    return configured_store(settings)
