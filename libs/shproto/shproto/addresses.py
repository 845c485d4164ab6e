"""Which of several addresses of one service is to be asked next. Pure: no channels, no clock, no event loop.

Owns: the current address, and when each address failed last. Does not own: connections, what counts as a failure.
Invariants: the current address changes only when it fails itself, however many calls to it fail together. An address
that has failed comes after all others for AVOIDED_MS; none is ever left out.
"""

import math
from collections.abc import Collection

# A process that was killed is back in about this time, or another has taken its work over. Asking it before the others
# meanwhile costs every call a failure, and up to its deadline where the machine is gone without a word.
AVOIDED_MS = 5_000


class AddressOrder:
    """Addresses are known by their position in the list that the user gave. `first`: the one to begin with."""

    def __init__(self, count: int, first: int = 0) -> None:
        self.current = first
        self._failed_ms = [-math.inf] * count

    def ordered(self, now_ms: float, without: Collection[int] = ()) -> list[int]:
        """Returns the addresses in the order in which they are to be tried, less those in `without`: from the current
        one on round the list, then those that failed within AVOIDED_MS, the longest ago first."""
        count = len(self._failed_ms)
        round_trip = [(self.current + step) % count for step in range(count)]
        chosen = [which for which in round_trip if which not in without]
        return sorted(chosen, key=lambda which: self._avoided_since(which, now_ms))

    def _avoided_since(self, which: int, now_ms: float) -> float:
        """When the address failed; minus infinity once that is forgotten, so that a sort leaves the order alone."""
        failed_ms = self._failed_ms[which]
        return failed_ms if now_ms - failed_ms < AVOIDED_MS else -math.inf

    def failed(self, which: int, now_ms: float) -> None:
        """Notes that a call to the address failed for a reason that another address may not have."""
        self._failed_ms[which] = now_ms
        if which == self.current:
            self.current = self.ordered(now_ms)[0]

    def answered(self, which: int) -> None:
        """Notes that the address answered."""
        self._failed_ms[which] = -math.inf
