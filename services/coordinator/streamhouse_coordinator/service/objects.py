"""Declares uploads before objects become part of the log, and deletes unreferenced objects in two phases."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from shproto.errors import Fenced, InvalidArgument

from streamhouse_coordinator.core import deletion
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.deletion import DeletionGrace, ObjectState, Verdict
from streamhouse_coordinator.core.projection import Put, Remove, RowOp
from streamhouse_coordinator.ports import AtMost, In, Lock, Transaction, where
from streamhouse_coordinator.recovery import rollback_detection
from streamhouse_coordinator.segment_keys import flaw_of_key
from streamhouse_coordinator.service.common import Context

log = logging.getLogger(__name__)


async def declare_uploads(context: Context, claim_id: str, object_keys: Sequence[str]) -> None:
    """Declares the uploads of the worker that holds the claim, of a buffer or a compaction. Declaring again changes
    nothing. Raises Fenced if the claim is lost, InvalidArgument for a key that is being deleted."""

    async def work(tx: Transaction) -> None:
        # Locked: a deletion that withdraws declarations ends their claims, so a late repetition of this call is
        # refused.
        claims = await _claims(tx, [claim_id], "wait")
        if not (claims.buffers or claims.compactions):
            raise Fenced(f"claim {claim_id!r} is done, or expired and taken by another worker", offered=claim_id)
        # The deletion has withdrawn the declaration: with a new one a segment could be registered in a deleted object.
        gone = await tx.select(t.DELETIONS, where(object_key=In(object_keys)))
        if gone:
            key = gone[0].object_key
            raise InvalidArgument(f"object {key!r} is being deleted", field="object_keys", value=key)
        worker_id = (claims.buffers or claims.compactions)[0].worker_id
        buffer_id = claims.buffers[0].buffer_id if claims.buffers else ""
        now_ms = await tx.now_ms()
        rows = [
            t.UploadIntentRow(
                object_key=key, claim_id=claim_id, buffer_id=buffer_id, worker_id=worker_id, declared_ms=now_ms
            )
            for key in object_keys
        ]
        await tx.apply([Put(t.UPLOAD_INTENTS, row) for row in rows])

    await context.store.run(work)


@dataclass(frozen=True, slots=True)
class JudgedObject:
    """An object and its verdict."""

    state: ObjectState
    verdict: Verdict


async def begin_deletion(
    context: Context, object_keys: Sequence[str], grace: DeletionGrace, dry_run: bool
) -> tuple[int, list[JudgedObject]]:
    """Begins the deletion of objects; returns PostgreSQL's time and a verdict per key. From BEGUN on, no segment can be
    registered in the object, ever. Raises MetadataWentBack after a rollback: segments of missing events would look like
    orphans."""

    async def work(tx: Transaction) -> tuple[int, list[JudgedObject]]:
        if not dry_run:
            await rollback_detection.check(tx, rollback_detection.COORDINATOR, rollback_detection.AGENT)
        # A dry run changes nothing, and must not hold up registrations in these objects.
        found = await _look(tx, object_keys, "" if dry_run else "wait")
        now_ms = await tx.now_ms()
        states = found.states(object_keys, now_ms)
        judged = [JudgedObject(state, deletion.judge(state, now_ms, grace)) for state in states]
        if not dry_run:
            await tx.apply(_changes(judged, found, now_ms, grace))
        return now_ms, judged

    return await context.store.run(work)


def _changes(judged: Sequence[JudgedObject], found: "_ObjectRows", now_ms: int, grace: DeletionGrace) -> list[RowOp]:
    ops = [op for item in judged for op in deletion.changes(item.state, item.verdict, now_ms)]
    withdrawn = [
        item.state.intent
        for item in judged
        if item.state.intent is not None and deletion.withdraws(item.state, item.verdict, now_ms, grace)
    ]
    return ops + deletion.withdrawal(withdrawn, found.claims.buffers, found.claims.compactions)


async def finish_deletion(context: Context, object_keys: Sequence[str]) -> None:
    """Ends the deletion of objects that are gone from the store."""

    async def work(tx: Transaction) -> None:
        # After the objects: after a crash in between, the next sweep finds the row and deletes the absent object once
        # more.
        await tx.apply([Remove(t.DELETIONS, {"object_key": key}) for key in object_keys])

    await context.store.run(work)


async def list_deletions(context: Context, grace: DeletionGrace, limit: int) -> list[str]:
    """Returns keys to delete even if no listing of the store shows them: unfinished deletions, and uploads that were
    never registered. The oldest first.

    Rows of an older version with keys that cannot hold segments are removed here, not returned: the store refuses such
    a key, and a refusal would stop every sweep before the later rows.
    """

    async def work(tx: Transaction) -> tuple[list[str], list[str]]:
        found = await _overdue(tx, grace, limit)
        flawed = [key for key in found if flaw_of_key(key)]
        gone = [{"object_key": key} for key in flawed]
        await tx.apply([Remove(table, key) for key in gone for table in (t.DELETIONS, t.UPLOAD_INTENTS)])
        return found, flawed

    # Again until no key is flawed: a page full of flawed keys would hide the good ones behind it.
    while True:
        found, flawed = await context.store.run(work)
        if not flawed:
            return found
        log.warning("%d keys to delete cannot be segments' and are dropped, the first is %r", len(flawed), flawed[0])


async def _overdue(tx: Transaction, grace: DeletionGrace, limit: int) -> list[str]:
    now_ms = await tx.now_ms()
    noticed = where(noticed_ms=AtMost(now_ms - grace.confirm_ms))
    declared = where(declared_ms=AtMost(now_ms - grace.grace_ms))
    deletions = await tx.select(t.DELETIONS, noticed, order=("noticed_ms", "object_key"), limit=limit)
    intents = await tx.select(t.UPLOAD_INTENTS, declared, order=("declared_ms", "object_key"), limit=limit)
    keys = [row.object_key for row in deletions] + [row.object_key for row in intents]
    return list(dict.fromkeys(keys))[:limit]


# ---- state of objects


@dataclass(frozen=True, slots=True)
class _Claims:
    """Claims that objects were declared under."""

    buffers: list[t.BufferClaimRow]
    compactions: list[t.CompactionClaimRow]

    def held(self, now_ms: int) -> set[str]:
        """Returns the ids of the claims that have not run out."""
        buffers = {row.claim_id for row in self.buffers if row.free_at_ms > now_ms}
        return buffers | {row.claim_id for row in self.compactions if row.expires_ms > now_ms}


@dataclass(frozen=True, slots=True, kw_only=True)
class _ObjectRows:
    """Rows that tell the state of objects; the dictionaries are by object key."""

    claims: _Claims
    intents: dict[str, t.UploadIntentRow]
    deletions: dict[str, t.DeletionRow]
    referenced: set[str]

    def states(self, object_keys: Sequence[str], now_ms: int) -> list[ObjectState]:
        """Returns the state of each object, in the order of `object_keys`."""
        held = self.claims.held(now_ms)
        found = []
        for key in object_keys:
            intent = self.intents.get(key)
            is_held = intent is not None and intent.claim_id in held
            found.append(
                ObjectState(
                    object_key=key,
                    referenced=key in self.referenced,
                    intent=intent,
                    held=is_held,
                    deletion=self.deletions.get(key),
                )
            )
        return found


async def _claims(tx: Transaction, claim_ids: Sequence[str], lock: Lock) -> _Claims:
    if not claim_ids:
        return _Claims([], [])
    buffers = await tx.select(t.BUFFER_CLAIMS, where(claim_id=In(claim_ids)), lock=lock)
    return _Claims(buffers, await tx.select(t.COMPACTION_CLAIMS, where(claim_id=In(claim_ids)), lock=lock))


async def _look(tx: Transaction, object_keys: Sequence[str], lock: Lock) -> _ObjectRows:
    """Returns the state of the objects. The intents are locked, so no registration in these objects is under way: an
    earlier registration is seen, and a later one finds no intent."""
    of_keys = where(object_key=In(object_keys))
    # Intents are read without a lock first: their claims have to be locked before them (LOCK_ORDER).
    claim_ids = sorted({row.claim_id for row in await tx.select(t.UPLOAD_INTENTS, of_keys)})
    claims = await _claims(tx, claim_ids, lock)
    intents = {row.object_key: row for row in await tx.select(t.UPLOAD_INTENTS, of_keys, lock=lock)}
    deletions = {row.object_key: row for row in await tx.select(t.DELETIONS, of_keys, lock=lock)}
    # Last, under the locks of the intents: a registration that held them has committed and is seen.
    totals = await tx.totals(t.SEGMENTS, of_keys, by=("object_key",))
    return _ObjectRows(claims=claims, intents=intents, deletions=deletions, referenced={row.group[0] for row in totals})
