"""Connections of commands to a cluster; they try again for --retry-timeout-ms when no coordinator answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from streamhouse_cli.options import retry_timeout_ms
from streamhouse_cli.process import run

if TYPE_CHECKING:
    from shcluster.peers import Peers
    from streamhouse.admin import Admin

Answer = TypeVar("Answer")


def ask(bootstrap: str, question: Callable[[Admin], Awaitable[Answer]]) -> Answer:
    """Calls `question` with an Admin, and returns its answer. Raises the errors of the Admin's methods."""

    async def call() -> Answer:
        async with open_admin(bootstrap) as admin:
            return await question(admin)

    return run(call)


def open_admin(bootstrap: str) -> Admin:
    """Returns an Admin with the command's --retry-timeout-ms."""
    from streamhouse import Admin

    return Admin(bootstrap, retry_timeout_ms=retry_timeout_ms())


def open_peers(bootstrap: str, request_timeout_ms: int) -> Peers:
    """Returns the services' own APIs, with the command's --retry-timeout-ms."""
    from shcluster.peers import Peers
    from shruntime.urls import addresses_of
    from streamhouse.retries import Retries

    addresses = addresses_of(bootstrap)
    retries = Retries("retry_timeout_ms", retry_timeout_ms(), addresses)
    return Peers(addresses, request_timeout_ms, wrap=retries.over)
