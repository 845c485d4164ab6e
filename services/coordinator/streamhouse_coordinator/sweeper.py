"""The coordinator's periodic work. Every coordinator does it; each sweep is one that may be repeated or overlap."""

import asyncio
import logging

from opentelemetry import metrics
from shproto.errors import StreamHouseError

from streamhouse_coordinator.service import buffers, groups, outages, recovery, sessions
from streamhouse_coordinator.service.common import Context

log = logging.getLogger(__name__)

_meter = metrics.get_meter("streamhouse.coordinator")
_waiting = _meter.create_gauge(
    "streamhouse_coordinator_buffers_waiting", description="sealed buffers that are not registered yet"
)
_waiting_bytes = _meter.create_gauge(
    "streamhouse_coordinator_buffers_waiting_bytes", unit="By", description="their bytes in memory or log of the agents"
)
_ended = _meter.create_counter(
    "streamhouse_coordinator_expired_total", description="sessions and group members whose heartbeats stopped, by kind"
)
_unsettled = _meter.create_gauge(
    "streamhouse_coordinator_unsettled_ranges", description="ranges whose agent is gone: readers wait at their ends"
)
_given_up = _meter.create_counter(
    "streamhouse_coordinator_ranges_lost_total", description="ranges given up by unclean_recovery_after_ms"
)


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
            _ended.add(count, {"kind": "session"})
            log.warning("%d sessions expired", count)
        if count := await groups.expire_members(self._context):
            _ended.add(count, {"kind": "group_member"})
            log.info("%d group members expired", count)
        given_up, waiting = await recovery.recover_unclean(self._context)
        _unsettled.set(waiting)
        if given_up:
            _given_up.add(given_up)
            log.error("%d ranges given up: their agents did not come back in time; records are lost", given_up)
        count, size_bytes = await buffers.backlog(self._context)
        _waiting.set(count)
        _waiting_bytes.set(size_bytes)
