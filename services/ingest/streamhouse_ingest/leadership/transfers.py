"""Gives leaderships up in good order: seal, upload, register, settle. One task per partition that moves away.

If segmenters cannot reach this agent, a partition is settled at the end of its log, and uploaded later.

Owns: the transfers under way, the ends that are still to be declared. Does not own: logs, buffers, the session.
Invariants: a partition has one transfer at a time. A transfer at once replaces a waiting transfer, never the reverse.
An end is declared only for a log that is held and whose writer has not failed.
"""

import asyncio
import logging

from shproto.errors import SessionExpired, StreamHouseError
from shproto.keys import RangeKey
from shproto.v1 import coordinator_pb2 as pb
from shruntime.tasks import Tasks, done_within

from streamhouse_ingest.leadership.context import LeadershipContext
from streamhouse_ingest.log.logs import HeldLog, Logs
from streamhouse_ingest.produce.writer import Writer
from streamhouse_ingest.sealing.sealer import Sealer

log = logging.getLogger(__name__)

# Number of partitions that refuse writes at the same time, however many have to move: their ends are declared in one
# call, answered by the coordinator in well under a second. With producers_per_partition_max producers in each partition
# the call has 13 MB.
TRANSFERS_AT_ONCE = 100


class LeadershipTransfers:
    """Transfers of partitions to other agents. Registration comes before settling, because the next leader needs the
    idempotent producers' state at the end; a transfer at once declares that state with the end."""

    def __init__(
        self, context: LeadershipContext, logs: Logs, writer: Writer, sealer: Sealer, tasks: Tasks, *, timeout_ms: int
    ) -> None:
        self._context = context
        self._logs = logs
        self._writer = writer
        self._sealer = sealer
        self._tasks = tasks
        self._timeout_ms = timeout_ms
        self._under_way: dict[RangeKey, asyncio.Task[None]] = {}
        self._at_once: set[RangeKey] = set()
        self._turn = asyncio.Semaphore(TRANSFERS_AT_ONCE)
        self._unsettled: dict[RangeKey, pb.WalEnd] = {}
        self._settling = asyncio.Lock()

    def is_under_way(self, held: HeldLog) -> bool:
        """Returns True if the log's partition is being transferred."""
        return held.log.key in self._under_way

    def start(self, held: HeldLog, *, at_once: bool = False) -> None:
        """Starts the transfer of a partition; `at_once`: without waiting for registration. Does nothing if a transfer
        is under way, except that `at_once` replaces a transfer that waits for registration."""
        key = held.log.key
        settling = held.log.settled_end is not None
        if key in self._under_way and (settling or not at_once or key in self._at_once):
            return
        if (waiting := self._under_way.pop(key, None)) is not None:
            waiting.cancel()
        log.info("%s moves to another agent%s", held.log.describe(), ", at once" if at_once else "")
        work = self._transfer_at_once(held) if at_once else self._transfer(held)
        task = self._tasks.spawn(f"move {held.log.describe()}", work)
        self._under_way[key] = task
        if at_once:
            self._at_once.add(key)
        task.add_done_callback(lambda task: self._over(key, task))

    def _over(self, key: RangeKey, task: asyncio.Task[None]) -> None:
        # Another task: a transfer at once has replaced the one that ended.
        if self._under_way.get(key) is task:
            del self._under_way[key]
            self._at_once.discard(key)

    def cancel_all(self) -> None:
        """Cancels all transfers: the session that asked for them is gone."""
        for task in self._under_way.values():
            task.cancel()

    async def _transfer(self, held: HeldLog) -> None:
        await self._flush(held)
        async with self._turn:
            while not await self._flush_and_stop(held) and self._is_held(held):
                log.warning("%s: not registered within %d ms, going on here", held.log.describe(), self._timeout_ms)
                # Writes are refused for timeout_ms at a time, however long segmenters take: the next try uploads the
                # rest while writes go on.
                self._logs.lead(held)
            if self._is_held(held) and not self._writer.broken:  # a replay finds the end of a broken log
                await self._settle(held)

    async def _transfer_at_once(self, held: HeldLog) -> None:
        async with self._turn:
            self._logs.stop_leading(held)
            # Appends that were decided before count: the end of the log is final only behind the group that is being
            # written.
            await self._writer.barrier()
            if self._is_held(held) and not self._writer.broken:
                if held.log.open is not None:
                    self._sealer.seal_alone(held)  # settling ends the buffer, and only announced buffers are uploaded
                await self._settle(held)

    def _is_held(self, held: HeldLog) -> bool:
        """Returns False if the range was lost or its topic deleted meanwhile: a dropped log must never lead again."""
        return self._logs.get(held.log.key) is held

    async def _flush(self, held: HeldLog) -> None:
        self._sealer.seal_now([held])
        await held.wait_registered(held.log.next_offset)

    async def _flush_and_stop(self, held: HeldLog) -> bool:
        """Uploads the log while writes go on, then refuses writes and uploads the rest. Returns True if all of it is
        registered within timeout_ms."""
        await self._flush(held)
        self._logs.stop_leading(held)
        await self._writer.barrier()
        self._sealer.seal_now([held])
        return await done_within(self._context.clock, held.wait_registered(held.log.next_offset), self._timeout_ms)

    async def _settle(self, held: HeldLog) -> None:
        key = held.log.key
        self._logs.settle(held, held.log.next_offset)  # before the call: a late grant must not lead the log again
        self._unsettled[key] = pb.WalEnd(
            topic_id=key.topic_id,
            partition=key.partition,
            epoch=key.epoch,
            end_offset=held.log.next_offset,
            producer_snapshot=held.log.tail_snapshot(),
        )
        backoff, alone = self._context.backoff(), False
        try:
            while (error := await self._settle_with_others(key, alone)) is not None:
                log.warning("%s: cannot be settled yet: %s", held.log.describe(), error.message)
                alone = not error.retriable  # the refusal of a range must not hold up the others
                await self._context.clock.sleep_ms(backoff.next_ms())
        finally:
            self._unsettled.pop(key, None)

    async def _settle_with_others(self, key: RangeKey, alone: bool) -> StreamHouseError | None:
        """Declares the end of this range, and the other pending ends with it unless `alone`; one call at a time.
        Returns the error of the call; None if the range is settled, or the next session has to settle it."""
        async with self._settling:
            if key not in self._unsettled:
                return None  # declared by the call of another transfer
            keys = [key] if alone else list(self._unsettled)
            ends = [self._unsettled[pending] for pending in keys]
            try:
                await self._context.coordinator.settle_ranges(
                    pb.SettleRangesRequest(session_token=self._context.session.token, ends=ends)
                )
            except SessionExpired:
                pass  # the next session settles them
            except StreamHouseError as error:
                return error
            for settled in keys:
                self._unsettled.pop(settled, None)
            return None
