"""Periodic work of the coordinator: sweeps and pruning. Every coordinator does it.

Owns: the two loops. Does not own: leases, events. Invariant: every run may be repeated, and may overlap with the same
run of another coordinator.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from opentelemetry import metrics
from shproto.errors import StreamHouseError
from shruntime.counters import counter
from shruntime.tasks import run_until_first_ends

from streamhouse_coordinator.ports import Transaction
from streamhouse_coordinator.service import buffers, groups, orphaned_ranges, outages, pruning, reach, sessions
from streamhouse_coordinator.service.common import Context, make_moves

log = logging.getLogger(__name__)

# Between two runs of the pruner over a long history: leaves most of the time to other work.
PRUNE_PAUSE_S = 0.5

_meter = metrics.get_meter("streamhouse.coordinator")
_waiting = _meter.create_gauge(
    "streamhouse_coordinator_buffers_waiting", description="sealed buffers that are not registered yet"
)
_waiting_bytes = _meter.create_gauge(
    "streamhouse_coordinator_buffers_waiting_bytes", unit="By", description="their bytes in memory or log of the agents"
)
_ended = counter(
    _meter,
    "streamhouse_coordinator_expired_total",
    "sessions and group members whose heartbeats stopped, by kind",
    label="kind",
    values=("session", "group_member"),
)
_unsettled = _meter.create_gauge(
    "streamhouse_coordinator_unsettled_ranges", description="ranges whose agent is gone: readers wait at their ends"
)
_cut_off = _meter.create_gauge(
    "streamhouse_coordinator_agents_cut_off", description="agents that workers cannot reach: they lead nothing"
)
_ranges_lost = counter(
    _meter, "streamhouse_coordinator_ranges_lost_total", "ranges declared lost by unclean_recovery_after_ms"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _DueWork:
    """Work found by a look, and values of the gauges."""

    after_outage: bool
    moves_due: bool
    reach_due: bool
    cut_off: int
    sessions_expired: bool
    orphaned: int
    unclean_topics: list[str]
    backlog: tuple[int, int]


class Sweeper:
    """Ends expired sessions and members, moves partitions, and gives the gauges their values."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def run(self) -> None:
        """Sweeps for ever; the next sweep tries again after a failure. Groups are swept beside the sessions, since
        there may be thousands, each with a lock to wait for: a late sweep would count as an outage, and extend the
        leases of dead agents."""
        sweeps = {"sweeps": self._again_and_again(self.sweep), "groups": self._again_and_again(self.expire_members)}
        await run_until_first_ends(sweeps)

    async def _again_and_again(self, sweep: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await sweep()
            # Only expected errors are retried: any other is a defect and ends the service.
            except StreamHouseError as error:
                log.debug("sweep: %s", error.message)
            await asyncio.sleep(self._context.settings.session_sweep_interval_ms / 1000)

    async def sweep(self) -> None:
        """Looks for due work in a small transaction, then works. After an outage only extends the leases: the next
        sweep does the rest. Raises the errors of the store."""
        found = await self._context.store.run(self._look)
        if found.after_outage:
            interval_ms = self._context.settings.session_sweep_interval_ms
            if away_ms := await outages.extend_leases_after_outage(self._context.store, interval_ms):
                log.warning("no sweep for %d ms: leases are extended by as much", away_ms)
            return
        # Before the moves: the end of a session changes the shares that they follow from.
        if found.sessions_expired and (count := await sessions.expire_sessions(self._context)):
            _ended.add(count, {"kind": "session"})
            log.warning("%d sessions expired", count)
        if found.reach_due:
            await reach.apply(self._context)
        if found.moves_due:
            await make_moves(self._context)
        await self._recover(found)
        _cut_off.set(found.cut_off)
        _waiting.set(found.backlog[0])
        _waiting_bytes.set(found.backlog[1])

    async def _look(self, tx: Transaction) -> _DueWork:
        reach_due, cut_off = await reach.is_due(tx, self._context.settings)
        after_outage, moves_due = await outages.note_sweep(tx, self._context.settings.session_sweep_interval_ms)
        orphaned, unclean_topics = await orphaned_ranges.count_orphaned(tx)
        return _DueWork(
            after_outage=after_outage,
            moves_due=moves_due,
            reach_due=reach_due,
            cut_off=cut_off,
            sessions_expired=await sessions.any_expired(tx),
            orphaned=orphaned,
            unclean_topics=unclean_topics,
            backlog=await buffers.backlog(tx),
        )

    async def expire_members(self) -> None:
        """Removes expired group members. Raises the errors of the store."""
        names = await self._context.store.run(groups.groups_with_expired)
        count = sum([await groups.expire_members(self._context, name) for name in names])
        if count:
            _ended.add(count, {"kind": "group_member"})
            log.info("%d group members expired", count)

    async def _recover(self, found: _DueWork) -> None:
        lost = 0
        if found.unclean_topics:
            lost = await orphaned_ranges.recover_unclean(self._context, found.unclean_topics)
        _unsettled.set(found.orphaned - lost)
        if lost:
            _ranges_lost.add(lost)
            log.error("%d ranges declared lost: their agents did not come back within unclean_recovery_after_ms", lost)


class Pruner:
    """Removes events that are no longer needed."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def run(self) -> None:
        """Prunes for ever; the next run tries again after a failure. Waits first, so that followers that return
        together with the coordinators, after an outage of all, find their events."""
        pause_s = self._context.settings.events_prune_interval_ms / 1000
        while True:
            await asyncio.sleep(pause_s)
            try:
                count = await pruning.prune(self._context)
            except StreamHouseError as error:
                log.debug("events are not pruned for now: %s", error.message)
                count = 0
            is_behind = count == pruning.BATCH * pruning.BATCHES
            pause_s = PRUNE_PAUSE_S if is_behind else self._context.settings.events_prune_interval_ms / 1000
