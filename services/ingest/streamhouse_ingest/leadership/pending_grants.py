"""Decides which grants to request next: all grants, or those of the ranges named by events. Pure.

Owns: the pending keys, the rest of the last answers, the version of the last answer to a request for all.
Invariants: every change is covered, because events bring all changes and a heartbeat's version shows a missing event.
An event that is older than an answer to a request for all adds no key. Keys that become pending while a request is
under way wait for the next request.
"""

from collections.abc import Collection, Iterable, Mapping

from shformat.limits import INT64_MAX
from shproto.keys import RangeKey

# Limit of the coordinator for the keys of a request; beyond it a request for all is no more work.
RANGES_ASKED_MAX = 10_000
_NO_EVENT = INT64_MAX  # behind every event

# The requested ranges, each with the position of the event that made it pending. Empty: all ranges.
GrantRequest = Mapping[RangeKey, int]


class PendingGrants:
    """`take` a request, then `answered` or `put_back`. True while grants are pending."""

    def __init__(self) -> None:
        self._all = False
        self._ranges: dict[RangeKey, int] = {}
        self._rest: set[RangeKey] = set()
        self._as_of = 0

    def begin(self) -> None:
        """Makes all grants pending and forgets versions: a session was opened."""
        self._as_of = 0
        self._rest.clear()
        self.request_all()

    def request_all(self) -> None:
        """Makes all grants pending."""
        self._all = True
        self._ranges.clear()

    def request(self, keys: Iterable[RangeKey]) -> None:
        """Makes these grants pending, whatever their age."""
        self._request(keys, _NO_EVENT)

    def changed(self, keys: Iterable[RangeKey], position: int) -> None:
        """Makes grants pending that an event at `position` changed, unless an answer about all is newer."""
        if position > self._as_of:
            self._request(keys, position)

    def _request(self, keys: Iterable[RangeKey], position: int) -> None:
        if not self._all:
            self._ranges |= dict.fromkeys(keys, position)
            if len(self._ranges) > RANGES_ASKED_MAX:
                self.request_all()

    def check_version(self, version: int, seen_position: int) -> None:
        """Makes all grants pending if they changed at the event `version`, and neither an answer nor the events up to
        `seen_position` have brought the change."""
        if version != self._as_of and version > seen_position:
            self.request_all()

    def __bool__(self) -> bool:
        """True while grants are pending."""
        return self._all or bool(self._ranges or self._rest)

    def take(self) -> GrantRequest | None:
        """Returns the next request; None if no grant is pending."""
        if not self:
            return None
        asked = {} if self._all else {**dict.fromkeys(self._rest, _NO_EVENT), **self._ranges}
        if len(asked) > RANGES_ASKED_MAX:
            return dict.fromkeys(first_of(self._rest), _NO_EVENT)  # the others later, or newer epochs came first
        self._all, self._ranges = False, {}
        return asked

    def put_back(self, request: GrantRequest) -> None:
        """Makes the grants of a request pending again that was not answered."""
        if not request:
            self.request_all()
        elif not self._all:
            missing = {key: position for key, position in request.items() if key not in self._rest}
            self._ranges = {**missing, **self._ranges}
            if len(self._ranges) > RANGES_ASKED_MAX:
                self.request_all()

    def answered(self, request: GrantRequest, version: int, rest: Collection[RangeKey] = ()) -> None:
        """Notes an answer as of the event `version`. `rest`: the ranges that did not fit into the answer, to be
        requested again. After an answer to a request for all, older events add no key."""
        if request:
            self._rest = (self._rest - request.keys()) | set(rest)
        else:
            self._as_of = version
            self._ranges = {key: position for key, position in self._ranges.items() if position > version}
            self._rest = set(rest)

    def waits_for_rest(self, keys: Collection[RangeKey]) -> bool:
        """Returns True if any of `keys` (empty: any range) did not fit into the answers so far."""
        return not self._rest.isdisjoint(keys) if keys else bool(self._rest)


def first_of(rest: Collection[RangeKey]) -> list[RangeKey]:
    """Returns the keys of one request, in the order of answers: older epochs of a partition first."""
    return sorted(rest)[:RANGES_ASKED_MAX]
