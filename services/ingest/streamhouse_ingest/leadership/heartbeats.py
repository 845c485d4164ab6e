"""Renews the session's lease, requests more offsets for ranges that run low, and reports a full log.

Owns: the interval and TTL of the session, the last report of a full log. Does not own: the lease, the ranges.
Invariants: the lease counts from before a heartbeat was sent. No heartbeat waits for the log's thread, which may hang
on the disk. A full log is reported only when that changes.
"""

import asyncio
import logging

from shproto.errors import AWAY, RENEWED, SessionExpired, StreamHouseError
from shproto.keys import RangeKey
from shproto.v1 import coordinator_pb2 as pb
from shruntime.tasks import ends_within

from streamhouse_ingest.leadership.context import LeadershipContext
from streamhouse_ingest.leadership.grants import Grants
from streamhouse_ingest.leadership.ranges import Ranges
from streamhouse_ingest.log.logs import HeldLog, Logs
from streamhouse_ingest.log.wal_space import WalSpace

log = logging.getLogger(__name__)


class Heartbeats:
    """Heartbeats of the agent's session: `begin` when a session opens, then `run` until the session is lost."""

    def __init__(self, context: LeadershipContext, logs: Logs, ranges: Ranges, grants: Grants, space: WalSpace) -> None:
        self._context = context
        self._logs = logs
        self._ranges = ranges
        self._grants = grants
        self._space = space
        self._reported_full = False
        self._interval_ms = 0
        self._ttl_ms = 0
        self._now = asyncio.Event()

    def begin(self, interval_ms: int, ttl_ms: int) -> None:
        """Takes over the interval and TTL of a session that was opened."""
        self._interval_ms, self._ttl_ms = interval_ms, ttl_ms
        self._reported_full = False

    def appended(self, held: HeldLog) -> None:
        """Sends the next heartbeat at once where the log's range runs low. A subscriber of Logs.appended."""
        if held.log.runs_low:
            self._now.set()

    async def run(self) -> None:
        """Sends heartbeats, at once when a range runs low. Raises SessionExpired when the session is lost."""
        backoff = self._context.backoff()
        wait_ms: float = self._interval_ms
        while True:
            await ends_within(self._context.clock, self._now.wait(), wait_ms)
            self._now.clear()
            try:
                await self._beat()
            except SessionExpired:
                raise
            except StreamHouseError as error:
                log.warning("heartbeat failed: %s", error.message)
                # At most the interval: a failed call must not make the next renewal later than a call that succeeds.
                wait_ms = min(backoff.next_ms(), self._interval_ms)
            else:
                backoff.reset()
                wait_ms = self._interval_ms

    async def _beat(self) -> None:
        context = self._context
        full = self._space.is_full
        # Before the call: the coordinator counts its TTL from a moment that is not earlier, so the lease here ends
        # first.
        sent_ms = context.clock.monotonic_ms()
        request = pb.HeartbeatRequest(session_token=context.session.token, low_ranges=_low_ranges(self._logs))
        if full != self._reported_full:
            request.log_full = full
        try:
            response = await context.coordinator.heartbeat(request)
        except StreamHouseError as error:
            # AWAY: the coordinator answers without its database. It can grant nothing to another agent, and does not
            # count this time against the lease; offsets last as long as the range. RENEWED: the lease is renewed, only
            # the rest of the heartbeat was refused because of too many other calls.
            if error.details.get("database") == AWAY or error.details.get("lease") == RENEWED:
                context.lease.renew(sent_ms, self._ttl_ms)
            raise
        context.lease.renew(sent_ms, response.ttl_ms)
        self._reported_full = full  # not before the answer, so that a report that was lost is repeated
        for grant in response.extended:
            self._ranges.extend(RangeKey(grant.topic_id, grant.partition, grant.epoch), grant.limit_offset)
        self._grants.check_version(response.grants_version, context.session.position)
        # Neither is awaited: a disk that hangs would hold up the next heartbeat, and so end the lease. The position is
        # saved with each heartbeat, so that a restart recognises metadata that was restored to an earlier state.
        context.history.save_later()
        self._space.check()  # for the next beat


def _low_ranges(logs: Logs) -> list[pb.RangeUse]:
    return [
        pb.RangeUse(
            topic_id=held.log.key.topic_id,
            partition=held.log.key.partition,
            epoch=held.log.key.epoch,
            next_offset=held.log.next_offset,
        )
        for held in logs
        if held.log.leading and held.log.runs_low
    ]
