"""Drives the segmenter from an asyncio loop: a periodic scan, started early by events, and the housekeeping.

Owns: the tasks of scan and housekeeping. Does not own: the work itself (service.py). Invariants: the scan finds all
work by itself, so that lost events stop nothing; after stop() no new work is claimed.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from shproto.errors import StreamHouseError
from shruntime.tasks import Tasks
from shstore import StoreError

from streamhouse_segmenter.ports import Ports
from streamhouse_segmenter.service import Segmenter
from streamhouse_segmenter.settings import SegmenterSettings

log = logging.getLogger(__name__)


class LoopWorker:
    """`wake()` starts a scan at once; `stop()` finishes claimed work."""

    def __init__(self, segmenter: Segmenter, settings: SegmenterSettings, ports: Ports) -> None:
        self._segmenter = segmenter
        self._settings = settings
        self._ports = ports
        self._tasks = Tasks()
        self._awake = asyncio.Event()
        self._stopping = asyncio.Event()

    async def start(self) -> None:
        self._tasks.spawn("segmenter scan", self._scan())
        for name, interval_ms, work in (
            ("compaction", self._settings.compaction_interval_ms, self._segmenter.compact),
            ("retention", self._settings.retention_interval_ms, self._segmenter.apply_retention),
            ("history mark", self._settings.retention_interval_ms, self._segmenter.mark_history),
            ("orphan sweep", self._settings.orphan_sweep_interval_ms, self._segmenter.sweep_orphans),
        ):
            self._tasks.spawn(f"segmenter {name}", self._repeat(name, interval_ms, work))

    def wake(self) -> None:
        """Starts a scan now, as a buffer may be waiting."""
        self._segmenter.wake()
        self._awake.set()

    async def stop(self) -> None:
        """Claims nothing more, finishes claimed buffers within shutdown_timeout_ms, then cancels the rest."""
        self._segmenter.close()
        self._stopping.set()
        self._awake.set()
        try:
            async with asyncio.timeout(self._settings.shutdown_timeout_ms / 1000):
                # Drains of nameko handlers included: their claims would run out only after claim_ttl_ms.
                await self._segmenter.wait_idle()
        except TimeoutError:
            log.warning("buffers in hand are left to others after shutdown_timeout_ms")
        await self._tasks.stop()

    async def _scan(self) -> None:
        while not self._stopping.is_set():
            # Before the drain: a wake during the drain starts the next scan at once.
            self._awake.clear()
            wait_ms = self._settings.scan_interval_ms
            try:
                report = await self._segmenter.drain()
            except StreamHouseError as error:
                log.warning("cannot scan for buffers: %s", error)
            # A defect must not end the scan: without it, work whose event was lost is never found.
            except Exception:
                log.exception("the scan failed by a defect, again in %d ms", wait_ms)
            else:
                wait_ms = min(wait_ms, report.retry_after_ms or wait_ms)
            await self._wait_awake(wait_ms)

    async def _wait_awake(self, wait_ms: int) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_ms / 1000):
                await self._awake.wait()

    async def _repeat(self, name: str, interval_ms: int, work: Callable[[], Awaitable[object]]) -> None:
        """Runs `work` about every `interval_ms`, with jitter, so that processes do not work at the same time."""
        while True:
            await self._ports.clock.sleep_ms(interval_ms * self._ports.rng.uniform(0.75, 1.25))
            try:
                await work()
            except (StreamHouseError, StoreError) as error:
                log.warning("%s failed, again in about %d ms: %s", name, interval_ms, error)
            except Exception:
                log.exception("%s failed by a defect, again in about %d ms", name, interval_ms)
