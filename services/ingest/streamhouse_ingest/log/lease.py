"""The lease: the time for which the agent may acknowledge after its last successful heartbeat.

Owns: the end of the lease. Does not own: the clock, the renewals (leadership/heartbeats.py, leadership/session.py).
Invariants: a renewal never shortens the lease. Safety does not depend on the lease (epochs own disjoint offset ranges);
the lease only makes a cut-off leader stop by itself.
"""


class Lease:
    """A lease measured on the agent's monotonic clock, from before the renewal was sent, minus `margin_ms`."""

    def __init__(self, margin_ms: int) -> None:
        self.margin_ms = margin_ms
        self._until_ms: int | None = None

    def renew(self, sent_ms: int, ttl_ms: int) -> None:
        """Extends the lease after the coordinator answered a renewal sent at `sent_ms`. A renewal whose answer arrives
        after that of a later renewal changes nothing."""
        # From the sending on, less a margin for clock drift: the lease must end here before the coordinator lets it run
        # out.
        until_ms = sent_ms + max(ttl_ms - self.margin_ms, 0)
        if self._until_ms is None or until_ms > self._until_ms:
            self._until_ms = until_ms

    def drop(self) -> None:
        """Ends the lease, as the session is gone: nothing may be acknowledged until the next session is open."""
        self._until_ms = None

    def held(self, now_ms: int) -> bool:
        """True if the lease lasts beyond `now_ms`, on the monotonic clock."""
        return self._until_ms is not None and now_ms < self._until_ms
