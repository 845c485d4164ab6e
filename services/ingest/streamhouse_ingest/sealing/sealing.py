"""Which open buffers are to be sealed now, and which of them share one object."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from shproto.keys import RangeKey

# Sealed buffers of an agent that are not registered yet. Up to so many is what uploads under way account for.
BACKLOG_EASY = 8
# Twice the time for each BACKLOG_EASY more. At most 256 times: a durable ack waits 5 s for company instead of 20 ms.
DOUBLINGS_MAX = 8
# No buffer waits longer than this for its age, however large the backlog is (a setting above it stays as it is).
STRETCHED_AGE_MS_MAX = 60_000


@dataclass(frozen=True, slots=True)
class SealLimits:
    """seal_bytes: of one partition. open_bytes_max: of all open buffers together. object_bytes_max: of what is
    announced as one, because one segmenter builds it in memory."""

    seal_bytes: int
    seal_age_ms: int
    durable_linger_ms: int
    open_bytes_max: int
    object_bytes_max: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """A buffer with something in it. durable_since_ms: since when a durable ack waits for it."""

    key: RangeKey
    size_bytes: int
    first_append_ms: int
    durable_since_ms: int | None = None
    must: bool = False  # shutdown, move, lost leadership


@dataclass(frozen=True, slots=True)
class SealPlan:
    """What to seal now, each list as one announcement; when to look again if nothing else happens."""

    objects: tuple[tuple[RangeKey, ...], ...]
    look_again_ms: int | None


def limits_behind(limits: SealLimits, backlog: int) -> SealLimits:
    """Returns the limits with longer times for an agent whose `backlog` sealed buffers are not registered yet.

    Buffers of a log are registered one after the other. Sealed faster than that goes, each is one more claim, object
    and transaction in line, and none of their acknowledgements comes sooner: without this, a metadata store that took
    a second for a registration was a growing line of small buffers, and no durable ack within its time.
    """
    doublings = min(backlog // BACKLOG_EASY, DOUBLINGS_MAX)
    if not doublings:
        return limits
    age_ms = max(limits.seal_age_ms, min(limits.seal_age_ms << doublings, STRETCHED_AGE_MS_MAX))
    return replace(limits, seal_age_ms=age_ms, durable_linger_ms=limits.durable_linger_ms << doublings)


def plan_seals(candidates: Sequence[Candidate], now_ms: int, limits: SealLimits) -> SealPlan:
    """Pure. Partitions that would be due by age soon go along with those that are, so that they share an object."""
    due = [candidate for candidate in candidates if _deadline(candidate, limits) <= now_ms]
    if any(_aged(candidate, now_ms, limits.seal_age_ms) for candidate in due):
        chosen = {candidate.key for candidate in due}
        soon_ms = limits.seal_age_ms // 2
        due += [c for c in candidates if c.key not in chosen and _aged(c, now_ms, soon_ms)]
    due += _over_total(candidates, due, limits.open_bytes_max)
    sealed = {candidate.key for candidate in due}
    waiting = [_deadline(candidate, limits) for candidate in candidates if candidate.key not in sealed]
    return SealPlan(_objects(due, limits.object_bytes_max), min(waiting, default=None))


def _deadline(candidate: Candidate, limits: SealLimits) -> int:
    if candidate.must or candidate.size_bytes >= limits.seal_bytes:
        return 0
    by_age = candidate.first_append_ms + limits.seal_age_ms
    if candidate.durable_since_ms is None:
        return by_age
    return min(by_age, candidate.durable_since_ms + limits.durable_linger_ms)


def _aged(candidate: Candidate, now_ms: int, age_ms: int) -> bool:
    return now_ms - candidate.first_append_ms >= age_ms


def _over_total(candidates: Sequence[Candidate], due: Sequence[Candidate], open_bytes_max: int) -> list[Candidate]:
    """The largest ones, until the rest fits."""
    chosen = {candidate.key for candidate in due}
    rest = sorted((c for c in candidates if c.key not in chosen), key=lambda c: c.size_bytes, reverse=True)
    total = sum(candidate.size_bytes for candidate in rest)
    more = []
    for candidate in rest:
        if total <= open_bytes_max:
            break
        more.append(candidate)
        total -= candidate.size_bytes
    return more


def _objects(due: Sequence[Candidate], object_bytes_max: int) -> tuple[tuple[RangeKey, ...], ...]:
    objects: list[list[RangeKey]] = []
    room = 0
    for candidate in due:
        if not objects or candidate.size_bytes > room:
            objects.append([])
            room = object_bytes_max
        objects[-1].append(candidate.key)
        room -= candidate.size_bytes
    return tuple(tuple(keys) for keys in objects)
