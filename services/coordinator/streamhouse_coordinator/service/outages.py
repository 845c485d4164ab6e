"""Time in which nobody could renew a lease does not count against those who hold one.

Without this, a PostgreSQL that was away for longer than a lease lasts would, on its return, find every agent and every
group member expired, and every partition would change hands for nothing.
"""

from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.projection import Put, RowOp, Set
from streamhouse_coordinator.ports import Transaction, where

SWEEP = "sweep"
# Sweeps in a row that have to be missing, of all coordinators, before it counts as an outage: one or two are load.
MISSED_SWEEPS = 3


async def forgive(tx: Transaction, sweep_interval_ms: int) -> int:
    """Notes that there is a sweep now. If there was none for long, all leases move by that time. Returns it in ms, 0
    if there was no outage."""
    now_ms = await tx.now_ms()
    rows = await tx.select(t.SWEEPS, where(name=SWEEP), lock="wait")
    await tx.apply([Put(t.SWEEPS, t.SweepRow(SWEEP, now_ms))])
    away_ms = now_ms - rows[0].last_ms if rows else 0
    if away_ms <= MISSED_SWEEPS * sweep_interval_ms:
        return 0
    await tx.apply(await _moved(tx, away_ms))
    return away_ms


async def _moved(tx: Transaction, away_ms: int) -> list[RowOp]:
    leases = await tx.select(t.SESSION_LEASES, lock="wait")
    members = await tx.select(t.GROUP_MEMBER_STATE, lock="wait")
    ops: list[RowOp] = [
        Set(t.SESSION_LEASES, (row.session_id,), {"expires_ms": row.expires_ms + away_ms}) for row in leases
    ]
    key = t.GROUP_MEMBER_STATE.key_of
    return ops + [Set(t.GROUP_MEMBER_STATE, key(row), {"expires_ms": row.expires_ms + away_ms}) for row in members]
