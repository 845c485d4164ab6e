"""Stops calls to a helper that does not answer, and probes the helper after a while."""

from __future__ import annotations


class CircuitBreaker:
    """Opens after `failures_max` failures in a row; after `open_ms` one call per `open_ms` may probe."""

    def __init__(self, failures_max: int, open_ms: int) -> None:
        self._failures_max = failures_max
        self._open_ms = open_ms
        self._failures = 0
        self._next_probe_ms = 0

    def allows(self, now_ms: int) -> bool:
        """True if the call is to be made. An allowed probe moves the next probe `open_ms` away."""
        if self._failures < self._failures_max:
            return True
        if now_ms < self._next_probe_ms:
            return False
        # Set before the probe has an answer: all others go on without the helper meanwhile.
        self._next_probe_ms = now_ms + self._open_ms
        return True

    def succeeded(self) -> None:
        """Closes the breaker: the helper answers."""
        self._failures = 0

    def failed(self, now_ms: int) -> bool:
        """Counts a failure; returns True if the failure opened the breaker."""
        self._failures += 1
        if self._failures >= self._failures_max:
            self._next_probe_ms = now_ms + self._open_ms
        return self._failures == self._failures_max
