"""Works off all buffers that can be claimed, several at a time.

Owns: the number of builds in this process. Does not own: when to look (adapters), the steps of a buffer (handover.py).
Invariants: at most builds_in_flight_max builds run together, for any number of callers; after close() nothing is
claimed.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from shproto.v1 import coordinator_pb2
from shruntime.tasks import cancel_and_wait, outcomes

from streamhouse_segmenter import telemetry
from streamhouse_segmenter.handover import Handover, HandoverOutcome, HandoverResult
from streamhouse_segmenter.ports import Ports
from streamhouse_segmenter.settings import SegmenterSettings
from streamhouse_segmenter.store_probe import StoreProbe


@dataclass(slots=True, kw_only=True)
class DrainReport:
    """Buffers by outcome, and the shortest time after which to look again, beside the periodic scan (None: none)."""

    registered: int = 0
    failed: int = 0
    claims_lost: int = 0
    retry_after_ms: int | None = None

    def add(self, result: HandoverResult) -> None:
        """Counts the outcome of a handover."""
        self.registered += result.outcome is HandoverOutcome.REGISTERED
        self.claims_lost += result.outcome is HandoverOutcome.CLAIM_LOST
        if result.outcome is HandoverOutcome.FAILED:
            self.failed += 1
            self.look_again_within(result.retry_after_ms)

    def look_again_within(self, wait_ms: int) -> None:
        """Notes work that cannot be claimed before `wait_ms`."""
        self.retry_after_ms = wait_ms if self.retry_after_ms is None else min(self.retry_after_ms, wait_ms)


class _Slot:
    """The right to build; given back once, by the first caller."""

    def __init__(self, slots: asyncio.Semaphore) -> None:
        self._slots = slots
        self._held = True
        telemetry.builds_in_flight.add(1)

    def give_back(self) -> None:
        """Gives the right back; later calls change nothing."""
        if self._held:
            self._held = False
            self._slots.release()
            telemetry.builds_in_flight.add(-1)


class Drain:
    """`run` may be called by any number of callers at once: together they build at most builds_in_flight_max."""

    def __init__(
        self, ports: Ports, settings: SegmenterSettings, worker_id: str, may_claim: Callable[[], bool]
    ) -> None:
        self._ports = ports
        self._settings = settings
        self._worker_id = worker_id
        self._may_claim = may_claim
        self._slots = asyncio.Semaphore(settings.builds_in_flight_max)
        self._closing = asyncio.Event()
        self._store_probe = StoreProbe(ports.store)
        self._woken = asyncio.Event()
        self._runs = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def close(self) -> None:
        """Claims nothing more; claimed buffers are finished."""
        self._closing.set()
        self._woken.set()

    def wake(self) -> None:
        """Makes runs that wait for their last buffers look again, as a buffer may be waiting."""
        self._woken.set()

    async def wait_idle(self) -> None:
        """Returns once no run of any caller is under way."""
        await self._idle.wait()

    async def run(self) -> DrainReport:
        """Claims and hands over until nothing can be claimed and nothing waits; returns the outcomes.

        Raises StreamHouseError if the coordinator does not answer; claimed buffers are finished first.
        """
        self._runs += 1
        self._idle.clear()
        try:
            return await self._run()
        finally:
            self._runs -= 1
            if not self._runs:
                self._idle.set()

    async def _run(self) -> DrainReport:
        report = DrainReport()
        running: set[asyncio.Task[HandoverResult]] = set()
        try:
            while not self._closing.is_set():
                # Cleared before the claim: a buffer that is announced meanwhile wakes the wait that follows.
                self._woken.clear()
                started = await self._start_next()
                if started is not None:
                    running.add(started)
                elif not running:
                    break
                running = await self._collect(running, report, idle=started is None)
        except asyncio.CancelledError:
            # Not awaited here: the finally below awaits every task.
            for task in running:
                task.cancel()
            raise
        finally:
            # Also after an error of the coordinator: nothing else would finish these buffers before the claims end.
            for result in await outcomes(*running):
                if isinstance(result, HandoverResult):
                    report.add(result)
        if self._store_probe.is_needed:
            report.look_again_within(self._settings.handover_retry_max_ms)
        return report

    async def _start_next(self) -> asyncio.Task[HandoverResult] | None:
        # Before the claim, because a claim runs out while it waits for a slot.
        await self._slots.acquire()
        slot = _Slot(self._slots)
        claim = None
        try:
            claim = await self._claim()
        finally:
            if claim is None:
                slot.give_back()
        return None if claim is None else asyncio.create_task(self._hand_over(claim, slot))

    async def _claim(self) -> coordinator_pb2.ClaimBufferResponse | None:
        if (
            self._closing.is_set()
            or not await self._store_probe.wait_until_available(self._closing)
            # Last: the session may be lost while the store is asked.
            or not self._may_claim()
        ):
            return None
        claim = await self._ports.coordinator.claim_buffer(
            coordinator_pb2.ClaimBufferRequest(
                worker_id=self._worker_id,
                claim_ttl_ms=self._settings.claim_ttl_ms,
                # A pull from such an agent takes its whole timeout, and keeps a build from another agent's buffers.
                except_agents=sorted(self._ports.agents.unreachable),
            )
        )
        return claim if claim.found else None

    async def _hand_over(self, claim: coordinator_pb2.ClaimBufferResponse, slot: _Slot) -> HandoverResult:
        try:
            result = await Handover(self._ports, self._settings, claim).run(slot.give_back)
            if result.by_store:
                self._store_probe.note_failure()
            return result
        finally:
            slot.give_back()

    async def _collect(
        self, running: set[asyncio.Task[HandoverResult]], report: DrainReport, *, idle: bool
    ) -> set[asyncio.Task[HandoverResult]]:
        """Returns the tasks still running. Waits if there is nothing to claim or too many wait for registration."""
        # Uploaded buffers wait for earlier ones without a slot: without this limit a stuck range would collect them
        # all.
        if len(running) >= self._settings.registrations_waiting_max + self._settings.builds_in_flight_max:
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        elif idle:
            await self._wait_for_news(running)
        done = {task for task in running if task.done()}
        for task in done:
            report.add(task.result())
        return running - done

    async def _wait_for_news(self, running: set[asyncio.Task[HandoverResult]]) -> None:
        """Returns once a task is done, an event arrives, or a while has passed: the buffer that the others wait for
        may have been given back and be claimable again."""
        waking = asyncio.create_task(self._woken.wait())
        try:
            await asyncio.wait(
                {*running, waking},
                timeout=self._settings.early_retry_max_ms / 1000,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            await cancel_and_wait(waking)
