"""What the agent has to ask the coordinator about its ranges: about all of them, or about those that events named.

The events bring every change, so that asking for what they name is enough; all is asked for when a session begins, and
when a heartbeat tells of a change that the events have not brought.
"""

from collections.abc import Iterable, Mapping

from streamhouse_ingest.core.partition_log import LogKey

# As many as the coordinator lets one question name; beyond it, asking for all is no more work.
RANGES_ASKED_MAX = 10_000
_NO_EVENT = 2**63 - 1  # behind every event

# The ranges asked for, each with the position of the event that made it wanted. None: all.
Question = Mapping[LogKey, int]


class Wanted:
    """Owns what is to be asked next. What becomes wanted while a question is under way waits for the next one."""

    def __init__(self) -> None:
        self._all = False
        self._ranges: dict[LogKey, int] = {}
        self._as_of = 0

    def begin(self) -> None:
        """A session was opened: all has to be asked for, whatever was known of another one."""
        self._as_of = 0
        self.want_all()

    def want_all(self) -> None:
        self._all = True
        self._ranges.clear()

    def want(self, keys: Iterable[LogKey]) -> None:
        """These may have changed."""
        self._want(keys, _NO_EVENT)

    def changed(self, keys: Iterable[LogKey], position: int) -> None:
        """An event at `position` changed these."""
        if position > self._as_of:
            self._want(keys, position)

    def _want(self, keys: Iterable[LogKey], position: int) -> None:
        if not self._all:
            self._ranges |= dict.fromkeys(keys, position)
            if len(self._ranges) > RANGES_ASKED_MAX:
                self.want_all()

    def heard_of(self, version: int, seen_position: int) -> None:
        """Who leads what changed last at the event `version`; the events up to `seen_position` have come in."""
        if version != self._as_of and version > seen_position:
            self.want_all()

    def take(self) -> Question | None:
        """What to ask now; None when there is nothing."""
        if not (self._all or self._ranges):
            return None
        question = {} if self._all else self._ranges
        self._all, self._ranges = False, {}
        return question

    def put_back(self, question: Question) -> None:
        """It was not answered."""
        if not question:
            self.want_all()
        elif not self._all:
            self._ranges = {**question, **self._ranges}

    def answered(self, question: Question, version: int) -> None:
        """All ranges are known as of the event `version` if it asked for all: older events tell nothing new."""
        if not question:
            self._as_of = version
            self._ranges = {key: position for key, position in self._ranges.items() if position > version}
