"""Records that the metadata went back in time: events that were seen are gone.

A rollback has to be recorded at once: new events soon take the positions of the missing ones, and hide it. After a
coordinator's record all additions to the log and removals stop, until the metadata is restored. A record from an agent
stops deletions only, since the agent's note may be damaged.
"""

import logging

from shproto.errors import MetadataWentBack

from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.projection import Put, Remove, RowOp
from streamhouse_coordinator.core.sessions import INGEST
from streamhouse_coordinator.ports import Store, Transaction, where
from streamhouse_coordinator.recovery.histories import Head, went_back
from streamhouse_coordinator.service.common import CLUSTER_LOCK

log = logging.getLogger(__name__)

COORDINATOR, AGENT = "coordinator", "agent"


async def record(store: Store, seen: Head, seen_by: str) -> None:
    """Records that the event of `seen` is gone, unless that is recorded already or a restore has replaced the history.
    A coordinator's record ends the leases of all ingest agents, which get no new sessions before a restore. Raises
    Unavailable."""

    async def work(tx: Transaction) -> bool:
        histories = await tx.select(t.HISTORIES, order=("nth",))
        known = await tx.select(t.FORKS)
        # A record of a coordinator implies that of an agent.
        if histories[-1].history_id != seen.history_id or any(row.seen_by in (COORDINATOR, seen_by) for row in known):
            return False
        ops: list[RowOp] = [
            Put(
                t.FORKS,
                t.ForkRow(
                    history_id=seen.history_id, position=seen.position, seen_by=seen_by, noticed_ms=await tx.now_ms()
                ),
            )
        ]
        # Agents find their leases gone with the next heartbeat, and check() refuses them new sessions.
        if seen_by == COORDINATOR:
            agents = await tx.select(t.SESSIONS, where(role=INGEST))
            ops += [Remove(t.SESSION_LEASES, {"session_id": row.session_id}) for row in agents]
        await tx.apply(ops)
        return True

    # Under the cluster lock, so that no session opens between the look at the records and the end of the leases.
    if await store.run(work, lock=CLUSTER_LOCK):
        log.critical(
            "the metadata went back: event %d of history %s was seen and is not there any more. Bring it back with "
            "`streamhouse restore` (docs/backup.md)", seen.position, seen.history_id,
        )  # fmt: skip


async def check(tx: Transaction, *seen_by: str) -> None:
    """Checks that none of `seen_by` has recorded a rollback. Raises MetadataWentBack."""
    for row in await tx.select(t.FORKS):
        if row.seen_by in seen_by:
            there = Head(history_id=row.history_id, position=await tx.position())
            raise went_back(
                there, Head(history_id=row.history_id, position=row.position), "that event was seen, and is gone"
            )


def proves_rollback(error: MetadataWentBack, seen: Head) -> bool:
    """Returns True if `error` says that events of the current history are missing; an error about another history
    proves nothing."""
    return bool(seen.history_id) and error.details.get("history_id") == seen.history_id
