"""After a failed upload, asks the store whether it is available before the next buffer is claimed.

While the store is away every claim would end like the last one, after a useless build. And the next buffer would be a
younger one, since the failed buffer waits for its next try: once the store was back, the younger would be uploaded
first and then wait, not registered, for the older ones. If the store answers, the failure had another cause: the other
buffers go on, and the failed buffer keeps its own back-off.
"""

import asyncio
import logging

from shruntime.tasks import cancel_and_wait
from shstore import ObjectStore, StoreError

log = logging.getLogger(__name__)


class StoreProbe:
    """`store` repeats by itself: a single question notices within its back-off that the store is back."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._asking = False
        self.is_needed = False

    def note_failure(self) -> None:
        """Notes that the store failed a call."""
        self.is_needed = True

    async def wait_until_available(self, closing: asyncio.Event) -> bool:
        """Returns True if the store is believed to be available; waits for its answer, but not once `closing` is set.

        One caller at a time asks; the others get False meanwhile.
        """
        if not self.is_needed:
            return True
        if self._asking:
            return False
        self._asking = True
        try:
            self.is_needed = not await self._answers(closing)
        finally:
            self._asking = False
        return not self.is_needed

    async def _answers(self, closing: asyncio.Event) -> bool:
        asking = asyncio.create_task(self._store.check(), name="ask the store")
        stopping = asyncio.create_task(closing.wait(), name="wait for the end")
        try:
            await asyncio.wait((asking, stopping), return_when=asyncio.FIRST_COMPLETED)
            # Also if both are done: the answer decides, not the order in which they are seen.
            if asking.done():
                asking.result()
        except StoreError as error:
            log.warning("the store is not there, nothing is claimed until it is: %s", error)
            return False
        finally:
            await cancel_and_wait(asking, stopping)
        return not closing.is_set()
