"""Time in which nobody could renew a lease does not count against those who hold one.

Without this, a PostgreSQL that was away for longer than a lease lasts would, on its return, find every agent and every
group member expired, and every partition would change hands for nothing.
"""

from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.projection import Put, RowOp, Set
from streamhouse_coordinator.ports import Store, Transaction, where
from streamhouse_coordinator.service.common import CLUSTER_LOCK, MOVES_DUE
from streamhouse_coordinator.settings import MISSED_SWEEPS

SWEEP = "sweep"


async def note_sweep(tx: Transaction, sweep_interval_ms: int) -> tuple[bool, bool]:
    """Notes that there is a sweep now, unless the last one was so long ago that there was an outage: then the leases
    are to be extended first. Returns True for an outage; and True if moves of partitions are due, which the same table
    tells."""
    moves_due = bool(await tx.select(t.SWEEPS, where(name=MOVES_DUE)))
    if await was_outage(tx, sweep_interval_ms):
        return True, moves_due
    await tx.apply([Put(t.SWEEPS, t.SweepRow(SWEEP, await tx.now_ms()))])
    return False, moves_due


async def was_outage(tx: Transaction, sweep_interval_ms: int) -> bool:
    """Returns True if the last sweep is more than MISSED_SWEEPS intervals ago: leases that have run out since are to be
    extended, not ended."""
    rows = await tx.select(t.SWEEPS, where(name=SWEEP))
    return bool(rows) and await tx.now_ms() - rows[0].last_ms > MISSED_SWEEPS * sweep_interval_ms


async def extend_leases_after_outage(store: Store, sweep_interval_ms: int) -> int:
    """Extends all leases by the time without a sweep if that was long, so that an outage expires no session, and notes
    that there is one now. Returns that time in ms, 0 if another coordinator was the first to notice."""

    async def work(tx: Transaction) -> int:
        now_ms = await tx.now_ms()
        # Under the cluster lock, and locked itself, against sweeps that are noted: leases must not move twice.
        found = await tx.select(t.SWEEPS, where(name=SWEEP), lock="wait")
        away_ms = now_ms - found[0].last_ms if found else 0
        if away_ms <= MISSED_SWEEPS * sweep_interval_ms:
            return 0
        await tx.apply([Put(t.SWEEPS, t.SweepRow(SWEEP, now_ms))])
        await tx.apply(await _moved(tx, away_ms))
        return away_ms

    return await store.run(work, lock=CLUSTER_LOCK)


async def _moved(tx: Transaction, away_ms: int) -> list[RowOp]:
    leases = await tx.select(t.SESSION_LEASES, lock="wait")
    members = await tx.select(t.GROUP_MEMBER_STATE, lock="wait")
    ops: list[RowOp] = [
        Set(t.SESSION_LEASES, (row.session_id,), {"expires_ms": row.expires_ms + away_ms}) for row in leases
    ]
    key = t.GROUP_MEMBER_STATE.key_of
    return ops + [Set(t.GROUP_MEMBER_STATE, key(row), {"expires_ms": row.expires_ms + away_ms}) for row in members]
