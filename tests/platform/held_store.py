"""An object store whose uploads wait until a test lets them through."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from shstore import ObjectStore


class HeldStore:
    """The store behind it, but that puts of the keys for which `holds` is true wait until `release`. `reached`: one of
    them waits."""

    def __init__(self, store: ObjectStore, holds: Callable[[str], bool] = lambda key: True) -> None:
        self.reached = asyncio.Event()
        self._store = store
        self._holds = holds
        self._released = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._store, name)

    def release(self) -> None:
        self._released.set()

    async def put(self, key: str, *args: Any, **kwargs: Any) -> Any:
        if self._holds(key):
            self.reached.set()
            await self._released.wait()
        return await self._store.put(key, *args, **kwargs)
