"""Which objects may be deleted, decided without a database."""

import pytest
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.deletion import (
    DeletionGrace,
    ObjectState,
    Verdict,
    changes,
    judge,
    withdrawal,
    withdraws,
)
from streamhouse_coordinator.core.projection import Put, Remove

pytestmark = pytest.mark.quick

PATIENCE = DeletionGrace(grace_ms=1000, confirm_ms=300)
NOW_MS = 10_000
KEY = {"object_key": "k"}


def intent(age_ms: int) -> t.UploadIntentRow:
    return t.UploadIntentRow(object_key="k", claim_id="c1", buffer_id="b1", worker_id="w1", declared_ms=NOW_MS - age_ms)


def deletion(noticed_ago_ms: int, begun: bool = False) -> t.DeletionRow:
    return t.DeletionRow("k", NOW_MS - noticed_ago_ms, NOW_MS - noticed_ago_ms if begun else 0)


def state(
    referenced: bool = False,
    declared: t.UploadIntentRow | None = None,
    held: bool = False,
    known: t.DeletionRow | None = None,
) -> ObjectState:
    return ObjectState(object_key="k", referenced=referenced, intent=declared, held=held, deletion=known)


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (state(referenced=True), Verdict.REFERENCED),
        (state(referenced=True, known=deletion(5000, begun=True)), Verdict.REFERENCED),
        (state(declared=intent(999)), Verdict.DECLARED),
        (state(declared=intent(1000), held=True), Verdict.DECLARED),
        (state(declared=intent(1000)), Verdict.NOTICED),
        (state(), Verdict.NOTICED),
        (state(known=deletion(299)), Verdict.NOTICED),
        (state(known=deletion(300)), Verdict.BEGUN),
        (state(known=deletion(0, begun=True)), Verdict.BEGUN),
        (state(declared=intent(1000), known=deletion(300)), Verdict.BEGUN),
        (state(declared=intent(999), known=deletion(300)), Verdict.DECLARED),
    ],
)
def test_the_verdict(seen: ObjectState, expected: Verdict) -> None:
    """G8: what a segment lies in, or may lie in soon, is not deleted; the rest goes when readers had their time."""
    assert judge(seen, NOW_MS, PATIENCE) is expected


def test_without_patience_an_orphan_goes_at_once() -> None:
    assert judge(state(), NOW_MS, DeletionGrace(0, 0)) is Verdict.BEGUN


def test_what_a_verdict_changes() -> None:
    noticed, begun = t.DeletionRow("k", NOW_MS, 0), t.DeletionRow("k", NOW_MS - 300, NOW_MS)
    assert changes(state(), Verdict.NOTICED, NOW_MS) == [Put(t.DELETIONS, noticed)]
    assert changes(state(known=deletion(300)), Verdict.BEGUN, NOW_MS) == [Put(t.DELETIONS, begun)]
    for verdict in (Verdict.NOTICED, Verdict.DECLARED):
        assert changes(state(known=deletion(200)), verdict, NOW_MS) == []
    assert changes(state(known=deletion(300, begun=True)), Verdict.BEGUN, NOW_MS) == []
    assert changes(state(referenced=True), Verdict.REFERENCED, NOW_MS) == []
    adopted = state(referenced=True, known=deletion(9, begun=True))
    assert changes(adopted, Verdict.REFERENCED, NOW_MS) == [Remove(t.DELETIONS, KEY)]


def test_who_is_withdrawn() -> None:
    stale = state(declared=intent(1000))
    assert withdraws(stale, Verdict.BEGUN, NOW_MS, PATIENCE)
    assert not withdraws(stale, Verdict.NOTICED, NOW_MS, PATIENCE), "it may still be registered"
    registered = state(referenced=True, declared=intent(1000))
    assert withdraws(registered, Verdict.REFERENCED, NOW_MS, PATIENCE)
    under_way = state(referenced=True, declared=intent(1000), held=True)
    assert not withdraws(under_way, Verdict.REFERENCED, NOW_MS, PATIENCE), "the rest of a shared object comes later"


def test_a_withdrawal_ends_the_claim() -> None:
    """A repeated declaration that arrives late must not bring it back."""
    mine = t.BufferClaimRow(
        buffer_id="b1",
        wal_id="wal",
        sealed_ms=1,
        size_bytes=10,
        trace_context="",
        claim_id="c1",
        worker_id="w1",
        free_at_ms=5,
        attempt=2,
        last_reason="",
    )
    other = t.BufferClaimRow(
        buffer_id="b2",
        wal_id="wal",
        sealed_ms=2,
        size_bytes=10,
        trace_context="",
        claim_id="c2",
        worker_id="w1",
        free_at_ms=5,
        attempt=1,
        last_reason="",
    )
    compaction = t.CompactionClaimRow(topic_id="t", partition=0, claim_id="c1", worker_id="w1", expires_ms=5)
    freed = t.BufferClaimRow(
        buffer_id="b1",
        wal_id="wal",
        sealed_ms=1,
        size_bytes=10,
        trace_context="",
        claim_id="",
        worker_id="",
        free_at_ms=5,
        attempt=2,
        last_reason="",
    )
    assert withdrawal([intent(1)], [mine, other], [compaction]) == [
        Remove(t.UPLOAD_INTENTS, KEY),
        Put(t.BUFFER_CLAIMS, freed),
        Remove(t.COMPACTION_CLAIMS, {"topic_id": "t", "partition": 0}),
    ]
