"""Extends all leases by the time for which PostgreSQL was unreachable, so that an outage expires no session.

Otherwise a PostgreSQL that returns after longer than a lease would find every agent and every group member expired, and
every partition would change leaders for nothing.

Owns: the row of the last sweep. Invariant: the time of an outage is added to the leases once, by the coordinator that
moves that row first.
"""

from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.projection import Put, RowOp, Set
from streamhouse_coordinator.ports import Store, Transaction, where
from streamhouse_coordinator.service.common import CLUSTER_LOCK, MOVES_DUE
from streamhouse_coordinator.settings import MISSED_SWEEPS

SWEEP = "sweep"


async def note_sweep(tx: Transaction, sweep_interval_ms: int) -> tuple[bool, bool]:
    """Records the time of this sweep, unless the last sweep was so long ago that there was an outage: then the leases
    have to be extended first. Returns (True after an outage, True if moves of partitions are due)."""
    moves_due = bool(await tx.select(t.SWEEPS, where(name=MOVES_DUE)))
    if await was_outage(tx, sweep_interval_ms):
        return True, moves_due
    await tx.apply([Put(t.SWEEPS, t.SweepRow(SWEEP, await tx.now_ms()))])
    return False, moves_due


async def was_outage(tx: Transaction, sweep_interval_ms: int) -> bool:
    """Returns True if the last sweep is more than MISSED_SWEEPS intervals ago: leases that ran out since have to be
    extended, not ended."""
    rows = await tx.select(t.SWEEPS, where(name=SWEEP))
    # Without a row there was no sweep yet: a new database.
    return bool(rows) and await tx.now_ms() - rows[0].last_ms > MISSED_SWEEPS * sweep_interval_ms


async def extend_leases_after_outage(store: Store, sweep_interval_ms: int) -> int:
    """Extends all leases by the time without a sweep, and records a sweep. Returns that time in ms; 0 if there was no
    outage, or another coordinator has extended the leases already."""

    async def work(tx: Transaction) -> int:
        now_ms = await tx.now_ms()
        # The row is locked as well as the cluster: a sweep records its time without the cluster lock, and leases must
        # not be extended twice.
        found = await tx.select(t.SWEEPS, where(name=SWEEP), lock="wait")
        away_ms = now_ms - found[0].last_ms if found else 0
        if away_ms <= MISSED_SWEEPS * sweep_interval_ms:
            return 0
        await tx.apply([Put(t.SWEEPS, t.SweepRow(SWEEP, now_ms))])
        await tx.apply(await _moved(tx, away_ms))
        return away_ms

    return await store.run(work, lock=CLUSTER_LOCK)


async def _moved(tx: Transaction, away_ms: int) -> list[RowOp]:
    # Locked, and read after the locks: a heartbeat in this moment is either extended as well, or comes after.
    leases = await tx.select(t.SESSION_LEASES, lock="wait")
    members = await tx.select(t.GROUP_MEMBER_STATE, lock="wait")
    ops: list[RowOp] = [
        Set(t.SESSION_LEASES, (row.session_id,), {"expires_ms": row.expires_ms + away_ms}) for row in leases
    ]
    key = t.GROUP_MEMBER_STATE.key_of
    return ops + [Set(t.GROUP_MEMBER_STATE, key(row), {"expires_ms": row.expires_ms + away_ms}) for row in members]
