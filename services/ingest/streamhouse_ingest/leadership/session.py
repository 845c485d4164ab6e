"""The agent's session with the coordinator: opened, kept, closed, and opened again once lost.

Owns: the session's token, the lease, and the tasks that live as long as the session (heartbeats, event feed, grants).
Does not own: the logs, the ranges, the transfers.
Invariants: no batch is appended between two sessions. The tasks of a session end together. A token opens one session:
all tries to open it send the same request, so that a lost answer leaves no second session behind.
"""

import asyncio
import logging
import uuid
from collections.abc import Iterable, Sequence

from shproto.errors import AgentIdTaken, InvalidArgument, SessionExpired, StreamHouseError
from shproto.keys import RangeKey
from shproto.limits import SNAPSHOTS_BYTES_MAX
from shproto.v1 import coordinator_pb2 as pb

from streamhouse_ingest.leadership.context import LeadershipContext
from streamhouse_ingest.leadership.event_feed import EventFeed
from streamhouse_ingest.leadership.grants import Grants, range_keys
from streamhouse_ingest.leadership.heartbeats import Heartbeats
from streamhouse_ingest.leadership.pending_grants import first_of
from streamhouse_ingest.leadership.ranges import Ranges
from streamhouse_ingest.leadership.transfers import LeadershipTransfers
from streamhouse_ingest.log.logs import HeldLog, Logs
from streamhouse_ingest.log.partition_log import PartitionLog
from streamhouse_ingest.log.replay import NO_GAPS, ReplayGaps
from streamhouse_ingest.log.wal_space import WalSpace
from streamhouse_ingest.ports import WalBroken
from streamhouse_ingest.produce.writer import Writer
from streamhouse_ingest.sealing.sealer import Sealer

log = logging.getLogger(__name__)


class Session:
    """`open` first; then `run` until cancelled; then `close`."""

    def __init__(
        self,
        context: LeadershipContext,
        logs: Logs,
        writer: Writer,
        sealer: Sealer,
        ranges: Ranges,
        transfers: LeadershipTransfers,
        space: WalSpace,
    ) -> None:
        self._context = context
        self._coordinator = context.coordinator
        self._history = context.history
        self._lease = context.lease
        self._logs = logs
        self._writer = writer
        self._sealer = sealer
        self._ranges = ranges
        self._transfers = transfers
        self.grants = Grants(context, ranges)
        self._feed = EventFeed(context, logs, ranges, sealer, self.grants)
        self.heartbeats = Heartbeats(context, logs, ranges, self.grants, space)

    # ---- one session after the other

    async def run(self) -> None:
        """Follows the open session; opens another one whenever it is lost. Raises AgentIdTaken, WalBroken."""
        while True:
            await self._keep()
            log.warning("the session is lost, opening a new one")
            # Before the new session is asked for: no batch may be acknowledged between two sessions.
            self._lease.drop()
            self._context.session.clear()
            await self.open(str(uuid.uuid4()))

    async def open(self, token: str, gaps: ReplayGaps = NO_GAPS) -> None:
        """Opens a session, however long the coordinator takes to answer, and applies its grants of older ranges.

        No batch is appended meanwhile. While the metadata is older than this log (METADATA_WENT_BACK), the call is
        repeated until an operator restores the metadata. `gaps`: the gaps found by the replay. Raises AgentIdTaken,
        InvalidArgument, WalBroken, OSError.
        """
        self._transfers.cancel_all()
        await self._stop_leading()
        opened = await self._open_call(token, gaps)
        while not await self._resume(opened):
            log.warning("the session is lost already, opening it again")
            opened = await self._open_call(token, NO_GAPS)  # the first answer settled each log
        # Before the session is set, for which the announcer waits: the queue of the old session must be gone by then.
        self._sealer.restart()
        self._context.session.set(opened.session_token, opened.session_id, opened.feed_position)
        self.grants.begin()
        log.info(
            "session %s of ingest %s is open, %d older ranges to finish",
            opened.session_id,
            self._context.identity.agent_id,
            len(opened.resumed),
        )

    async def _stop_leading(self) -> None:
        """Stops leading all logs, and waits for the group that is being written: then the logs' ends are final."""
        for held in self._logs:
            self._logs.stop_leading(held)
        await self._writer.barrier()

    async def _resume(self, opened: pb.OpenSessionResponse) -> bool:
        """Applies the grants of older ranges, in as many answers as they fill. Returns False if the session is lost
        meanwhile: no batch was written in the session, so that its token may be used again."""
        self._logs.producer_ids_from = opened.producer_ids_from
        # Saved before the grants are applied, which may drop records: older metadata must be refused from then on.
        self._history.opened(opened.history_id, opened.feed_position)
        await self._history.save()
        self.heartbeats.begin(opened.heartbeat_interval_ms, opened.ttl_ms)
        rest = set((await self._ranges.resume(opened.resumed)).rest)
        try:
            while rest:
                asked = first_of(rest)
                response = await self._rest_call(opened.session_token, asked)
                self._history.advance(response.position)
                await self._history.save()
                rest = rest.difference(asked).union((await self._ranges.apply_grants(response.grants, asked)).rest)
        except SessionExpired:
            return False
        return True

    async def _rest_call(self, token: str, keys: Sequence[RangeKey]) -> pb.GetGrantsResponse:
        """Returns the grants of `keys`, which did not fit into the answers before. Renews the lease, since the
        heartbeats do not run yet."""
        backoff = self._context.backoff()
        request = pb.GetGrantsRequest(session_token=token, only=range_keys(keys))
        while True:
            self._check_log()
            sent_ms = self._context.clock.monotonic_ms()
            try:
                beat = await self._coordinator.heartbeat(pb.HeartbeatRequest(session_token=token))
                self._lease.renew(sent_ms, beat.ttl_ms)
                return await self._coordinator.get_grants(request)
            except (SessionExpired, InvalidArgument):
                raise
            except StreamHouseError as error:
                log.warning("cannot get the older ranges yet: %s", error.message)
                await self._context.clock.sleep_ms(backoff.next_ms())

    def _check_log(self) -> None:
        """Checks that the log has not failed. Raises WalBroken."""
        if self._writer.broken:
            raise WalBroken("no session is opened over a log that failed; the next start replays it")

    async def _open_call(self, token: str, gaps: ReplayGaps) -> pb.OpenSessionResponse:
        backoff = self._context.backoff()
        request = self._open_request(token, gaps)
        while True:
            self._check_log()
            sent_ms = self._context.clock.monotonic_ms()
            try:
                opened = await self._coordinator.open_session(request)
            except (AgentIdTaken, InvalidArgument):
                raise  # an operator has to act; all other errors pass by themselves, or once the metadata is restored
            except StreamHouseError as error:
                log.warning("cannot open a session yet: %s", error.message)
                await self._context.clock.sleep_ms(backoff.next_ms())
            else:
                self._must_outlast_heartbeats(opened.ttl_ms, opened.heartbeat_interval_ms)
                self._lease.renew(sent_ms, opened.ttl_ms)
                return opened

    def _must_outlast_heartbeats(self, ttl_ms: int, heartbeat_interval_ms: int) -> None:
        """Checks that the lease lasts until its next renewal; a shorter lease would refuse writes between two
        heartbeats. Raises InvalidArgument."""
        margin_ms = self._lease.margin_ms
        if ttl_ms - margin_ms <= heartbeat_interval_ms:
            raise InvalidArgument(
                f"lease_margin_ms ({margin_ms}) is too long for the coordinator's session_ttl_ms ({ttl_ms}) and "
                f"heartbeat_interval_ms ({heartbeat_interval_ms}): a lease lasts for session_ttl_ms less that, "
                f"{ttl_ms - margin_ms} ms, and must be renewed before that",
                field="lease_margin_ms",
                limit=ttl_ms - heartbeat_interval_ms - 1,
                value=margin_ms,
            )

    def _open_request(self, token: str, gaps: ReplayGaps) -> pb.OpenSessionRequest:
        """Returns the request for all tries. A try whose answer was lost may have opened the session; over a damaged
        log another token would declare unknown ends for ranges granted to that session and never written to."""
        return pb.OpenSessionRequest(
            session_token=token,
            agent_id=self._context.identity.agent_id,
            role="ingest",
            address=self._context.identity.address,
            wal_id=self._context.identity.wal_id,
            wal_ends=wal_ends(held for held in self._logs if gaps.knows_end(held.log.key)),
            ends_unknown=gaps.corrupt_frames,
            torn=gaps.torn_tail,
            history_id=self._history.seen.history_id,
            seen_position=self._history.seen.position,
        )

    async def _keep(self) -> None:
        """Renews the lease, follows the events and applies the grants; returns when the session is lost.

        The three tasks end together: heartbeats alone would renew a lease whose events are not followed. Raises the
        error that ends a task otherwise, unwrapped from its group.
        """
        task = asyncio.current_task()
        assert task is not None, "a coroutine runs in a task"
        cancellations = task.cancelling()
        failed: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.heartbeats.run(), name="heartbeats")
                group.create_task(self.grants.run(), name="grants")
                await self._feed.run()
        except BaseExceptionGroup as ended:
            _, others = ended.split(SessionExpired)
            failed = others and others.exceptions[0]
        if failed is not None:
            raise failed
        if task.cancelling() > cancellations:
            # The agent stops and the session is lost in the same turn of the loop: TaskGroup then raises only the loss,
            # `run` would open a new session, and `stop` would wait for this task for ever.
            raise asyncio.CancelledError

    async def close(self) -> None:
        """Gives session and ranges back, if the coordinator answers: the next leaders start at the ends of these logs.

        Without an answer, and always after the log failed, the session expires or is replaced, and the next start
        settles the ranges at the ends found by its replay. Appends must be refused already, and `run` must have ended,
        or it would open a new session.
        """
        token = self._context.session.token
        self._context.session.clear()
        # Before the ends are declared: the next leaders begin there, so no batch may be acknowledged any more.
        self._lease.drop()
        await self._stop_leading()
        if self._writer.broken:
            log.warning("the log failed: its ranges are left to the replay of the next start")
        elif token:
            try:
                ends = wal_ends(held for held in self._logs if held.log.settled_end is None)
                await self._coordinator.close_session(pb.CloseSessionRequest(session_token=token, ends=ends))
            except StreamHouseError as error:
                log.warning("the session could not be closed, it will expire: %s", error.message)


def wal_ends(helds: Iterable[HeldLog]) -> list[pb.WalEnd]:
    """Returns the end of each log with the state of its unregistered producers, as far as a message has room."""
    ends = []
    room_bytes = SNAPSHOTS_BYTES_MAX
    for held in helds:
        # With the end: the next leader must recognise retries of batches that were neither registered nor announced
        # (G5).
        snapshot = held.log.tail_snapshot()
        if len(snapshot) > room_bytes:
            log.warning("%s: too many producers to name; a retry may be written twice elsewhere", held.log.describe())
            # Those that fence are few, and need it most: the next leader answers their fences from it.
            snapshot = held.log.tail_snapshot(fencing_only=True)
            snapshot = b"" if len(snapshot) > room_bytes else snapshot
        room_bytes -= len(snapshot)
        ends.append(_wal_end(held.log, snapshot))
    return ends


def _wal_end(held: PartitionLog, snapshot: bytes) -> pb.WalEnd:
    return pb.WalEnd(
        topic_id=held.key.topic_id,
        partition=held.key.partition,
        epoch=held.key.epoch,
        end_offset=held.next_offset,
        producer_snapshot=snapshot,
        first_offset=held.registered_end,
        topic=held.topic,
    )
