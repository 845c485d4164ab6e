"""What the agent has to ask the coordinator about its ranges: about all of them, or about those that events named.

The events bring every change, so that asking for what they name is enough; all is asked for when a session begins, and
when a heartbeat tells of a change that the events have not brought. What an answer has no room for is asked for again.
"""

from collections.abc import Collection, Iterable, Mapping

from shformat.limits import INT64_MAX
from shproto.keys import RangeKey

# As many as the coordinator lets one question name; beyond it, asking for all is no more work.
RANGES_ASKED_MAX = 10_000
_NO_EVENT = INT64_MAX  # behind every event

# The ranges asked for, each with the position of the event that made it wanted. None: all.
GrantRequest = Mapping[RangeKey, int]


class PendingGrants:
    """Owns what is to be asked next. What becomes wanted while a question is under way waits for the next one."""

    def __init__(self) -> None:
        self._all = False
        self._ranges: dict[RangeKey, int] = {}
        self._rest: set[RangeKey] = set()
        self._as_of = 0

    def begin(self) -> None:
        """A session was opened: all has to be asked for, whatever was known of another one."""
        self._as_of = 0
        self._rest.clear()
        self.want_all()

    def want_all(self) -> None:
        self._all = True
        self._ranges.clear()

    def want(self, keys: Iterable[RangeKey]) -> None:
        """These may have changed."""
        self._want(keys, _NO_EVENT)

    def changed(self, keys: Iterable[RangeKey], position: int) -> None:
        """An event at `position` changed these."""
        if position > self._as_of:
            self._want(keys, position)

    def _want(self, keys: Iterable[RangeKey], position: int) -> None:
        if not self._all:
            self._ranges |= dict.fromkeys(keys, position)
            if len(self._ranges) > RANGES_ASKED_MAX:
                self.want_all()

    def heard_of(self, version: int, seen_position: int) -> None:
        """Who leads what changed last at the event `version`; the events up to `seen_position` have come in."""
        if version != self._as_of and version > seen_position:
            self.want_all()

    def __bool__(self) -> bool:
        """Whether there is something to ask."""
        return self._all or bool(self._ranges or self._rest)

    def take(self) -> GrantRequest | None:
        """What to ask now; None when there is nothing."""
        if not self:
            return None
        asked = {} if self._all else {**dict.fromkeys(self._rest, _NO_EVENT), **self._ranges}
        if len(asked) > RANGES_ASKED_MAX:
            return dict.fromkeys(first_of(self._rest), _NO_EVENT)  # the others later, or newer epochs came first
        self._all, self._ranges = False, {}
        return asked

    def put_back(self, request: GrantRequest) -> None:
        """It was not answered."""
        if not request:
            self.want_all()
        elif not self._all:
            missing = {key: position for key, position in request.items() if key not in self._rest}
            self._ranges = {**missing, **self._ranges}
            if len(self._ranges) > RANGES_ASKED_MAX:
                self.want_all()

    def answered(self, request: GrantRequest, version: int, rest: Collection[RangeKey] = ()) -> None:
        """All ranges are known as of the event `version` if it asked for all: older events tell nothing new. `rest`:
        those that did not fit into the answer; what is said of them later is not older."""
        if request:
            self._rest = (self._rest - request.keys()) | set(rest)
        else:
            self._as_of = version
            self._ranges = {key: position for key, position in self._ranges.items() if position > version}
            self._rest = set(rest)

    def waits_for_rest(self, keys: Collection[RangeKey]) -> bool:
        """Whether any of `keys` (none: any at all) did not fit into the answers so far."""
        return not self._rest.isdisjoint(keys) if keys else bool(self._rest)


def first_of(rest: Collection[RangeKey]) -> list[RangeKey]:
    """As many as one question may name, in the order in which answers have them: of a partition older epochs first."""
    return sorted(rest)[:RANGES_ASKED_MAX]
