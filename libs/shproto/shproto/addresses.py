"""Order in which the addresses of a service are tried. Pure: no channels, no clock, no event loop.

Owns: the current address, and the time of each address's last failure. Does not own: connections, the meaning of
failure.
Invariants: the current address changes only when it fails itself, however many calls to it fail together. An address
that has failed comes after all others for AVOIDED_MS; none is ever left out.
"""

import math
from collections.abc import Collection

# A process that was killed is back in about this time, or another has taken over its work. Until then, trying its
# address first would cost every call a failure, and up to its deadline if the machine is gone without closing.
AVOIDED_MS = 5_000


class AddressOrder:
    """Order of `count` addresses, which are known by their position in the user's list. `first`: position to begin
    with."""

    def __init__(self, count: int, first: int = 0) -> None:
        self.current = first
        self._failed_ms = [-math.inf] * count

    def ordered(self, now_ms: float, without: Collection[int] = ()) -> list[int]:
        """Returns the addresses in the order in which to try them, except those in `without`: from the current address
        on round the list, then those that failed within AVOIDED_MS, the longest ago first."""
        count = len(self._failed_ms)
        round_trip = [(self.current + step) % count for step in range(count)]
        chosen = [which for which in round_trip if which not in without]
        return sorted(chosen, key=lambda which: self._avoided_since(which, now_ms))

    def _avoided_since(self, which: int, now_ms: float) -> float:
        """Returns the time of the last failure; minus infinity once it is forgotten, so that a sort keeps the order."""
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
