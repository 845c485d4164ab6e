"""Time in which nobody could renew a lease does not count against those who hold one.

Without this, a PostgreSQL that was away for longer than a lease lasts would, on its return, find every agent and every
group member expired, and every partition would change hands for nothing.
"""

from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.projection import Put, RowOp, Set
from streamhouse_coordinator.ports import Transaction, where
from streamhouse_coordinator.service.common import CLUSTER_LOCK, MOVES_DUE
from streamhouse_coordinator.settings import MISSED_SWEEPS

SWEEP = "sweep"


async def extend_leases_after_outage(tx: Transaction, sweep_interval_ms: int) -> tuple[int, bool]:
    """Notes that there is a sweep now, and extends all leases by the time without one if that was long, so that an
    outage expires no session. Returns that time in ms, 0 if there was no outage; and True if moves of partitions are
    due, which the same table tells. The caller holds no lock yet."""
    now_ms = await tx.now_ms()
    rows = {row.name: row.last_ms for row in await tx.select(t.SWEEPS)}
    away_ms = now_ms - rows.get(SWEEP, now_ms)
    if away_ms > MISSED_SWEEPS * sweep_interval_ms:
        # Another coordinator may be the first to notice, and leases must not move twice.
        await tx.lock(CLUSTER_LOCK)
        found = await tx.select(t.SWEEPS, where(name=SWEEP), lock="wait")
        away_ms = now_ms - found[0].last_ms if found else 0
    await tx.apply([Put(t.SWEEPS, t.SweepRow(SWEEP, now_ms))])
    if away_ms <= MISSED_SWEEPS * sweep_interval_ms:
        return 0, MOVES_DUE in rows
    await tx.apply(await _moved(tx, away_ms))
    return away_ms, MOVES_DUE in rows


async def _moved(tx: Transaction, away_ms: int) -> list[RowOp]:
    leases = await tx.select(t.SESSION_LEASES, lock="wait")
    members = await tx.select(t.GROUP_MEMBER_STATE, lock="wait")
    ops: list[RowOp] = [
        Set(t.SESSION_LEASES, (row.session_id,), {"expires_ms": row.expires_ms + away_ms}) for row in leases
    ]
    key = t.GROUP_MEMBER_STATE.key_of
    return ops + [Set(t.GROUP_MEMBER_STATE, key(row), {"expires_ms": row.expires_ms + away_ms}) for row in members]
