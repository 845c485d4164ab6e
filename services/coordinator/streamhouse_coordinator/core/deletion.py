"""Decides which objects may be deleted. Pure.

Invariants: a segment is registered only in an object with a declared upload; deletion withdraws the declaration first,
so an object that may be deleted never becomes part of the log.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import IntEnum

from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.projection import Put, Remove, RowOp


class Verdict(IntEnum):
    """Verdicts of a deletion, numbered as DeletionVerdict in the proto."""

    REFERENCED = 1
    DECLARED = 2
    NOTICED = 3
    BEGUN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectState:
    """Known facts about an object. `held`: True while the claim under which the upload was declared is valid."""

    object_key: str
    referenced: bool
    intent: t.UploadIntentRow | None
    held: bool
    deletion: t.DeletionRow | None


@dataclass(frozen=True, slots=True)
class DeletionGrace:
    """Grace periods. `grace_ms`: how long an upload may take to be registered. `confirm_ms`: how long readers may use a
    plan that names an object."""

    grace_ms: int
    confirm_ms: int


def judge(state: ObjectState, now_ms: int, grace: DeletionGrace) -> Verdict:
    """Returns the verdict on an object. REFERENCED and DECLARED are refusals; the caller has to ask again about a
    NOTICED object."""
    # Before all else: no age of a declaration makes a part of the log an orphan.
    if state.referenced:
        return Verdict.REFERENCED
    if state.intent is not None and not is_stale(state, now_ms, grace):
        return Verdict.DECLARED
    # Begun for good, whatever the grace is now: the object may be gone from the store.
    if state.deletion is not None and state.deletion.begun_ms:
        return Verdict.BEGUN
    noticed_ms = now_ms if state.deletion is None else state.deletion.noticed_ms
    return Verdict.BEGUN if now_ms - noticed_ms >= grace.confirm_ms else Verdict.NOTICED


def is_stale(state: ObjectState, now_ms: int, grace: DeletionGrace) -> bool:
    """Returns True if no worker is expected to register the object any more. A late registration is refused and does no
    harm."""
    return state.intent is not None and not state.held and now_ms - state.intent.declared_ms >= grace.grace_ms


def withdraws(state: ObjectState, verdict: Verdict, now_ms: int, grace: DeletionGrace) -> bool:
    """Returns True if the declaration has to be withdrawn: deletion begins, or the object is registered and its worker
    is gone."""
    return verdict is Verdict.BEGUN or (verdict is Verdict.REFERENCED and is_stale(state, now_ms, grace))


def changes(state: ObjectState, verdict: Verdict, now_ms: int) -> list[RowOp]:
    """Returns the changes of the table of deletions that follow from the verdict."""
    key = {"object_key": state.object_key}
    match verdict:
        case Verdict.REFERENCED:
            return [Remove(t.DELETIONS, key)] if state.deletion is not None else []
        case Verdict.DECLARED:
            return []
        case Verdict.NOTICED | Verdict.BEGUN:
            before = state.deletion or t.DeletionRow(object_key=state.object_key, noticed_ms=now_ms, begun_ms=0)
            begun_ms = before.begun_ms or (now_ms if verdict is Verdict.BEGUN else 0)
            after = replace(before, begun_ms=begun_ms)
            return [] if after == state.deletion else [Put(t.DELETIONS, after)]


def withdrawal(
    intents: Iterable[t.UploadIntentRow],
    buffer_claims: Iterable[t.BufferClaimRow],
    compaction_claims: Iterable[t.CompactionClaimRow],
) -> list[RowOp]:
    """Returns the operations that remove the declarations and end their expired claims: a repeated declaration that
    arrives late must not bring a declaration back."""
    gone = list(intents)
    ended = {row.claim_id for row in gone}
    ops: list[RowOp] = [Remove(t.UPLOAD_INTENTS, {"object_key": row.object_key}) for row in gone]
    # The row of a buffer stays, for the next claim: its records are still to be uploaded.
    ops += [Put(t.BUFFER_CLAIMS, replace(c, claim_id="", worker_id="")) for c in buffer_claims if c.claim_id in ended]
    ops += [
        Remove(t.COMPACTION_CLAIMS, {"topic_id": c.topic_id, "partition": c.partition})
        for c in compaction_claims
        if c.claim_id in ended
    ]
    return ops
