"""Keeps the history of events short, in the background. Every coordinator does it, one at a time."""

import asyncio
import logging

from shproto.errors import StreamHouseError

from streamhouse_coordinator.service import pruning
from streamhouse_coordinator.service.common import Context

log = logging.getLogger(__name__)

# Between two runs over a long history: leaves most of the time to others.
PAUSE_S = 0.5


class Pruner:
    def __init__(self, context: Context) -> None:
        self._context = context

    async def run(self) -> None:
        """Prunes for ever; what fails is tried again by the next run. Waits first: followers that come back together
        with the coordinators, after an outage of all, find their events."""
        pause_s = self._context.settings.events_prune_interval_ms / 1000
        while True:
            await asyncio.sleep(pause_s)
            try:
                count = await pruning.prune(self._context)
            except StreamHouseError as error:
                log.debug("events are not pruned for now: %s", error.message)
                count = 0
            is_behind = count == pruning.BATCH * pruning.BATCHES
            pause_s = PAUSE_S if is_behind else self._context.settings.events_prune_interval_ms / 1000
