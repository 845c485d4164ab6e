"""One question to the cluster, and its answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from streamhouse.admin import Admin

Answer = TypeVar("Answer")


def ask(bootstrap: str, question: Callable[[Admin], Awaitable[Answer]]) -> Answer:
    """The answer; raises what the Admin's methods raise."""
    import asyncio

    from streamhouse import Admin

    async def call() -> Answer:
        async with Admin(bootstrap) as admin:
            return await question(admin)

    return asyncio.run(call())
