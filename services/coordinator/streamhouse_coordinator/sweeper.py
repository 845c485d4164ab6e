"""The coordinator's periodic work. Every coordinator does it; each sweep is one that may be repeated or overlap."""

import asyncio
import logging

from shproto.errors import StreamHouseError

from streamhouse_coordinator.service import groups, housekeeping, outages, sessions
from streamhouse_coordinator.service.common import Context

log = logging.getLogger(__name__)


class Sweeper:
    def __init__(self, context: Context) -> None:
        self._context = context

    async def run(self) -> None:
        """Sweeps for ever; what fails is tried again by the next sweep."""
        while True:
            try:
                await self.sweep()
            except StreamHouseError as error:
                log.debug("sweep: %s", error.message)
            await asyncio.sleep(self._context.settings.session_sweep_interval_ms / 1000)

    async def sweep(self) -> None:
        """Raises what the store raises."""
        if away_ms := await outages.forgive(self._context):
            log.warning("no sweep for %d ms: leases are extended by as much", away_ms)
        if count := await sessions.expire_sessions(self._context):
            log.warning("%d sessions expired", count)
        if count := await groups.expire_members(self._context):
            log.info("%d group members expired", count)
        if count := await housekeeping.recover_unclean(self._context):
            log.error("%d ranges given up: their agents did not come back in time; records are lost", count)
