"""Opens a store from options, a URL, or the settings of a service."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from shstore.errors import StoreInvalid
from shstore.local import LocalStore
from shstore.memory import MemoryStore
from shstore.options import StoreOptions
from shstore.retrying import RetryingStore, RetryPolicy

if TYPE_CHECKING:  # commands that only open a URL do without pydantic
    from shstore.settings import StoreSettings
from shstore.port import ObjectStore

_URL_OPTIONS = ("endpoint", "region")


def open_store(where: StoreOptions | str) -> ObjectStore:
    """Returns a store with a single attempt per call; RetryingStore adds retries. Does no I/O; `check()` does.

    A URL is `file:///directory`, `s3://bucket/prefix?endpoint=http://host:port&region=name` (credentials from boto's
    usual sources) or `memory:`. Raises StoreInvalid.
    """
    options = options_from_url(where) if isinstance(where, str) else where
    if options.kind == "local":
        return LocalStore(options)
    if options.kind == "s3":
        # Loading an S3 client takes a process half a second, and most commands and local platforms never need it.
        from shstore.s3 import S3Store

        return S3Store(options)
    return MemoryStore(options)


def configured_store(settings: StoreSettings) -> RetryingStore:
    """Returns the store of a service's settings, retries included. Does no I/O. Raises StoreInvalid."""
    policy = RetryPolicy(deadline_ms=max(1, settings.s3_attempts_deadline_ms))
    return RetryingStore(open_store(settings.options()), policy)


def options_from_url(url: str) -> StoreOptions:
    """Returns the options of a store URL. Raises StoreInvalid with the part that is wrong."""
    parsed = urlsplit(url)
    if parsed.scheme == "s3":
        return _s3_options(parsed)
    if parsed.netloc or parsed.query or parsed.fragment:
        raise StoreInvalid(f"store URL {url!r} has more than a scheme and a path")
    if parsed.scheme == "file":
        if not parsed.path.startswith("/"):
            raise StoreInvalid(f"store URL {url!r} needs an absolute path, as in file:///var/lib/streamhouse")
        return StoreOptions(kind="local", path=Path(unquote(parsed.path)))
    if parsed.scheme == "memory" and not parsed.path:
        return StoreOptions(kind="memory")
    raise StoreInvalid(f"store URL {url!r} is none of file:///path, s3://bucket/prefix, memory:")


def _s3_options(parsed: SplitResult) -> StoreOptions:
    if "@" in parsed.netloc or parsed.fragment:
        raise StoreInvalid("an s3:// store URL holds no credentials and no fragment")
    options = dict(parse_qsl(parsed.query, keep_blank_values=True))
    if unknown := sorted(options.keys() - set(_URL_OPTIONS)):
        raise StoreInvalid(f"store URL option {unknown[0]!r} is unknown, expected one of {_URL_OPTIONS}")
    return StoreOptions(
        kind="s3",
        bucket=parsed.netloc,
        prefix=unquote(parsed.path).strip("/"),
        endpoint=options.get("endpoint"),
        region=options.get("region", "us-east-1"),
    )
