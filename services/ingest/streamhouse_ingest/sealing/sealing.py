"""Plans the sealing of open buffers: which are due, and which share an object. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from shproto.keys import RangeKey

# Number of sealed, unregistered buffers of an agent up to which uploads under way explain the backlog.
BACKLOG_EASY = 8
# Times double with each further BACKLOG_EASY buffers, up to 256-fold: a durable ack then waits 5 s instead of 20 ms.
DOUBLINGS_MAX = 8
# Limit of seal_age_ms after doubling, for any backlog (a setting above this limit is used unchanged).
STRETCHED_AGE_MS_MAX = 60_000


@dataclass(frozen=True, slots=True, kw_only=True)
class SealLimits:
    """Limits at which buffers are sealed. seal_bytes: size of a single buffer. open_bytes_max: size of all open buffers
    together. object_bytes_max: size of an announcement, because a segmenter builds its object in memory."""

    seal_bytes: int
    seal_age_ms: int
    durable_linger_ms: int
    open_bytes_max: int
    object_bytes_max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SealCandidate:
    """A buffer that is not empty. durable_since_ms: start of the oldest wait of a durable ack for this buffer."""

    key: RangeKey
    size_bytes: int
    first_append_ms: int
    durable_since_ms: int | None = None
    must: bool = False  # shutdown, move, lost leadership


@dataclass(frozen=True, slots=True)
class SealPlan:
    """Buffers to seal now, a tuple per announcement, and the time of the next plan if nothing else happens (None: no
    buffer waits)."""

    objects: tuple[tuple[RangeKey, ...], ...]
    next_plan_ms: int | None


def limits_behind(limits: SealLimits, backlog: int) -> SealLimits:
    """Returns the limits with longer times for an agent whose `backlog` sealed buffers are not registered yet.

    Buffers of a log are registered one after another. If buffers are sealed faster than that, each adds a claim, an
    object and a transaction to the queue, and no acknowledgement comes sooner. Without longer times, a metadata store
    that took a second per registration led to a growing queue of small buffers, and every durable ack timed out.
    """
    doublings = min(backlog // BACKLOG_EASY, DOUBLINGS_MAX)
    if not doublings:
        return limits
    age_ms = max(limits.seal_age_ms, min(limits.seal_age_ms << doublings, STRETCHED_AGE_MS_MAX))
    return replace(limits, seal_age_ms=age_ms, durable_linger_ms=limits.durable_linger_ms << doublings)


def plan_seals(candidates: Sequence[SealCandidate], now_ms: int, limits: SealLimits) -> SealPlan:
    """Returns the plan for the open buffers. If a buffer is due by age, buffers with at least half that age are sealed
    with it, so that they share an object."""
    due = [candidate for candidate in candidates if _deadline(candidate, limits) <= now_ms]
    if any(_aged(candidate, now_ms, limits.seal_age_ms) for candidate in due):
        chosen = {candidate.key for candidate in due}
        soon_ms = limits.seal_age_ms // 2
        due += [c for c in candidates if c.key not in chosen and _aged(c, now_ms, soon_ms)]
    due += _over_total(candidates, due, limits.open_bytes_max)
    sealed = {candidate.key for candidate in due}
    waiting = [_deadline(candidate, limits) for candidate in candidates if candidate.key not in sealed]
    return SealPlan(_objects(due, limits.object_bytes_max), min(waiting, default=None))


def _deadline(candidate: SealCandidate, limits: SealLimits) -> int:
    if candidate.must or candidate.size_bytes >= limits.seal_bytes:
        return 0
    by_age = candidate.first_append_ms + limits.seal_age_ms
    if candidate.durable_since_ms is None:
        return by_age
    return min(by_age, candidate.durable_since_ms + limits.durable_linger_ms)


def _aged(candidate: SealCandidate, now_ms: int, age_ms: int) -> bool:
    return now_ms - candidate.first_append_ms >= age_ms


def _over_total(
    candidates: Sequence[SealCandidate], due: Sequence[SealCandidate], open_bytes_max: int
) -> list[SealCandidate]:
    """Returns the largest buffers that are not due, as many as needed for the rest to fit into `open_bytes_max`."""
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


def _objects(due: Sequence[SealCandidate], object_bytes_max: int) -> tuple[tuple[RangeKey, ...], ...]:
    objects: list[list[RangeKey]] = []
    room = 0
    for candidate in due:
        if not objects or candidate.size_bytes > room:
            objects.append([])
            room = object_bytes_max
        objects[-1].append(candidate.key)
        room -= candidate.size_bytes
    return tuple(tuple(keys) for keys in objects)
