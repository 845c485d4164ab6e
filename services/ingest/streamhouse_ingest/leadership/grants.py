"""Requests the agent's grants that changed, and applies the answers.

Owns: the pending grants, the callers of `refresh`. Does not own: the logs, which Ranges changes.
Invariants: one request is under way at a time, so that answers are applied in the order of their age; changes meanwhile
go into the next request together. An event drops a finished range only while no request is under
way.
"""

import asyncio
import logging
from collections.abc import Collection, Iterable

from shproto.errors import SessionExpired, StreamHouseError
from shproto.keys import RangeKey
from shproto.v1 import coordinator_pb2 as pb

from streamhouse_ingest.leadership.context import LeadershipContext
from streamhouse_ingest.leadership.pending_grants import GrantRequest, PendingGrants
from streamhouse_ingest.leadership.ranges import Ranges

log = logging.getLogger(__name__)


class Grants:
    """`refresh` waits for the answer; all other methods but `run` return at once."""

    def __init__(self, context: LeadershipContext, ranges: Ranges) -> None:
        self._context = context
        self._ranges = ranges
        self._pending = PendingGrants()
        self._asking = False
        self._awake = asyncio.Event()
        self._waiting: list[tuple[asyncio.Future[None], Collection[RangeKey]]] = []

    # ---- pending grants

    def begin(self) -> None:
        """Requests all grants: a session was opened."""
        self._pending.begin()
        self._awake.set()

    def request_all(self) -> None:
        """Requests all grants."""
        self._pending.request_all()
        self._awake.set()

    def changed(self, keys: Iterable[RangeKey], position: int) -> None:
        """Requests the grants of ranges that an event at `position` of the feed changed."""
        self._pending.changed(keys, position)
        self._awake.set()

    def settled(self, key: RangeKey, end_offset: int, position: int) -> None:
        """Applies the end of a range from an event at `position` of the feed. Requests the grant if the log has another
        end, or none."""
        if self._ranges.settled(key, end_offset):
            self.finished(key, position)
        else:
            self.changed([key], position)

    def finished(self, key: RangeKey, position: int) -> None:
        """Drops the range's log if events up to `position` finished the range: end and registration are all that an
        answer could add. An answer under way may be older than the events; the grant is requested again after it."""
        if self._asking:
            self.changed([key], position)
        else:
            self._ranges.drop_finished(key)

    def check_version(self, version: int, seen_position: int) -> None:
        """Compares a heartbeat's grants_version with the feed's position, and requests all grants if the feed has not
        brought that change."""
        self._pending.check_version(version, seen_position)
        self._awake.set()

    async def refresh(self, keys: Collection[RangeKey] = ()) -> None:
        """Requests these grants, or all, and returns once the answer is applied, in this session or a later one."""
        # Before the request: only an answer to a request that is sent from now on covers the caller.
        done = asyncio.get_running_loop().create_future()
        waiting = done, keys
        self._waiting.append(waiting)
        if keys:
            self._pending.request(keys)
        else:
            self._pending.request_all()
        self._awake.set()
        try:
            await done
        finally:
            self._waiting.remove(waiting)

    # ---- asking

    async def run(self) -> None:
        """Sends a request whenever grants are pending. Raises SessionExpired."""
        backoff = self._context.backoff()
        while True:
            await self._awake.wait()
            self._awake.clear()
            request = self._pending.take()
            if request is None:
                continue
            self._asking = True
            try:
                await self._ask(request)
            except SessionExpired:
                raise
            except StreamHouseError as error:
                log.warning("cannot apply the grants: %s", error.message)
                # The keys go back before the pause: changes meanwhile join them, and one request covers all.
                self._pending.put_back(request)
                self._awake.set()
            else:
                backoff.reset()
                continue
            finally:
                self._asking = False
            await self._context.clock.sleep_ms(backoff.next_ms())

    async def _ask(self, request: GrantRequest) -> None:
        waiting = list(self._waiting)  # the answer may be too old for callers that come from now on
        context = self._context
        response = await context.coordinator.get_grants(
            pb.GetGrantsRequest(session_token=context.session.token, only=range_keys(request))
        )
        # Saved before a batch is appended to a new range, so that metadata from before the grant is refused.
        context.history.advance(response.position)
        await context.history.save()
        result = await self._ranges.apply_grants(response.grants, request.keys())
        if spans := self._ranges.lost_spans(request.keys()):
            await context.coordinator.report_lost(
                pb.ReportLostRequest(session_token=context.session.token, spans=spans)
            )
        self._pending.answered(request, response.grants_version, result.rest)
        self._pending.request(result.finished)
        if self._pending:
            self._awake.set()
        for done, keys in waiting:
            if not done.done() and not self._pending.waits_for_rest(keys):
                done.set_result(None)


def range_keys(keys: Iterable[RangeKey]) -> list[pb.RangeKey]:
    """Returns the keys as messages."""
    return [pb.RangeKey(topic_id=key.topic_id, partition=key.partition, epoch=key.epoch) for key in keys]
