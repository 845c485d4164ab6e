"""Declared uploads for tests whose subject is something else: as if a worker with a claim had declared them."""

from collections.abc import Iterable

from streamhouse_coordinator.api import CoordinatorApi
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.projection import Put
from streamhouse_coordinator.ports import Transaction


async def declare(api: CoordinatorApi, object_keys: Iterable[str]) -> None:
    """From now on segments can be registered in these objects."""
    rows = [
        t.UploadIntentRow(object_key=key, claim_id="", buffer_id="", worker_id="", declared_ms=0)
        for key in object_keys
        if key
    ]

    async def work(tx: Transaction) -> None:
        await tx.apply([Put(t.UPLOAD_INTENTS, row) for row in rows])

    await api._context.store.run(work)
