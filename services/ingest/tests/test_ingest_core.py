"""Lease, sealing plan, WAL index."""

import pytest
from shproto.keys import RangeKey
from streamhouse_ingest.log.lease import Lease
from streamhouse_ingest.log.wal_index import WalIndex
from streamhouse_ingest.sealing.sealing import SealCandidate, SealLimits, limits_behind, plan_seals

pytestmark = pytest.mark.quick

LIMITS = SealLimits(seal_bytes=100, seal_age_ms=1000, durable_linger_ms=20, open_bytes_max=500, object_bytes_max=256)


def key(partition: int) -> RangeKey:
    return RangeKey(b"t" * 16, partition, 1)


def test_a_lease_runs_from_before_its_renewal_was_sent_minus_the_margin():
    lease = Lease(margin_ms=200)
    assert not lease.held(0)
    lease.renew(sent_ms=1000, ttl_ms=1000)
    assert lease.held(1799)
    assert not lease.held(1800)
    lease.renew(sent_ms=900, ttl_ms=1000)
    assert lease.held(1799), "an older answer that comes late takes nothing away"
    lease.drop()
    assert not lease.held(1000)
    lease.renew(0, 200)
    assert not lease.held(0), "a margin as long as the lease leaves nothing"


def test_nothing_is_due_before_its_time():
    plan = plan_seals([SealCandidate(key=key(0), size_bytes=99, first_append_ms=0)], 999, LIMITS)
    assert (plan.objects, plan.next_plan_ms) == ((), 1000)


def test_due_by_size_age_durable_waiter_and_order():
    candidates = [
        SealCandidate(key=key(0), size_bytes=100, first_append_ms=900),
        SealCandidate(key=key(1), size_bytes=1, first_append_ms=0),
        SealCandidate(key=key(2), size_bytes=1, first_append_ms=900, durable_since_ms=980),
        SealCandidate(key=key(3), size_bytes=1, first_append_ms=990, must=True),
        SealCandidate(key=key(4), size_bytes=1, first_append_ms=990, durable_since_ms=995),
    ]
    plan = plan_seals(candidates, 1000, LIMITS)
    assert plan.objects == ((key(0), key(1), key(2), key(3)),)
    assert plan.next_plan_ms == 1015


def test_those_soon_due_by_age_share_the_object():
    plan = plan_seals(
        [
            SealCandidate(key=key(0), size_bytes=1, first_append_ms=0),
            SealCandidate(key=key(1), size_bytes=1, first_append_ms=500),
            SealCandidate(key=key(2), size_bytes=1, first_append_ms=501),
        ],
        1000,
        LIMITS,
    )
    assert plan.objects == ((key(0), key(1)),)
    assert plan.next_plan_ms == 1501


def test_beyond_the_total_the_largest_go_first():
    candidates = [
        SealCandidate(key=key(i), size_bytes=size, first_append_ms=0) for i, size in enumerate((90, 99, 95, 98, 97, 96))
    ]
    plan = plan_seals(candidates, 10, LIMITS)
    assert plan.objects == ((key(1),),)


def test_an_object_has_a_size_limit():
    plan = plan_seals([SealCandidate(key=key(i), size_bytes=100, first_append_ms=0) for i in range(5)], 0, LIMITS)
    assert plan.objects == ((key(0), key(1)), (key(2), key(3)), (key(4),))


def test_with_a_backlog_buffers_wait_longer_for_company():
    """They are registered one after the other: more of them would be later, not earlier."""
    assert [limits_behind(LIMITS, backlog) for backlog in (0, 1, 7)] == [LIMITS] * 3
    times = [(found.durable_linger_ms, found.seal_age_ms) for found in (limits_behind(LIMITS, n) for n in range(200))]
    assert times == sorted(times)
    assert (times[8], times[16], times[199]) == ((40, 2_000), (80, 4_000), (5_120, 60_000))
    assert limits_behind(LIMITS, 10**6) == limits_behind(LIMITS, 64)
    slow = SealLimits(
        seal_bytes=100, seal_age_ms=3_600_000, durable_linger_ms=20, open_bytes_max=500, object_bytes_max=256
    )
    assert limits_behind(slow, 64).seal_age_ms == 3_600_000, "never below the setting"
    full = SealCandidate(key=key(0), size_bytes=100, first_append_ms=0)
    assert plan_seals([full], 0, limits_behind(LIMITS, 10**6)).objects == ((key(0),),), "what is full does not wait"


def test_files_go_from_the_front_once_everything_in_them_is_registered():
    index = WalIndex()
    for file in (1, 2, 3):
        index.resize(file, 1000)
        index.note(file, key(0), file * 10)
    index.note(1, key(1), 5)
    ends: dict[RangeKey, int] = {key(0): 20, key(1): 4}
    assert index.deletable(ends.get, active=3) == [], "one record of the first file is not registered"
    ends[key(1)] = 5
    assert index.deletable(ends.get, active=3) == [1, 2]
    ends[key(0)] = 30
    assert index.deletable(ends.get, active=3) == [1, 2], "never the active one"
    assert index.deletable(ends.get, active=None) == [1, 2, 3]
    index.remove(1)
    assert index.size_bytes == 2000
    assert WalIndex().deletable({}.get, None) == []


def test_a_log_nobody_needs_holds_no_file():
    index = WalIndex()
    index.resize(1, 10)
    index.note(1, key(0), 10)
    assert index.deletable(lambda _: None, None) == [1]
