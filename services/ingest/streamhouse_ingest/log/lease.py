"""How long the agent may acknowledge after its last successful heartbeat.

Safety does not rest on this (epochs own disjoint offset ranges); it only makes a cut-off leader stop by itself.
"""


class Lease:
    """Measured on the agent's own monotonic clock, from before the renewal was sent, minus a margin."""

    def __init__(self, margin_ms: int) -> None:
        self.margin_ms = margin_ms
        self._until_ms: int | None = None

    def renew(self, sent_ms: int, ttl_ms: int) -> None:
        """Extends the lease: the coordinator answered a renewal that was sent at `sent_ms`; one overtaken by a later
        one changes nothing."""
        until_ms = sent_ms + max(ttl_ms - self.margin_ms, 0)
        if self._until_ms is None or until_ms > self._until_ms:
            self._until_ms = until_ms

    def drop(self) -> None:
        """The session is gone: nothing may be acknowledged until a new one is open."""
        self._until_ms = None

    def held(self, now_ms: int) -> bool:
        return self._until_ms is not None and now_ms < self._until_ms
