"""Calls of a segmenter, as plain coroutines for its drivers: an event loop, nameko, a test.

Each may run in any number of processes at once.
"""

import logging
from collections.abc import Callable

from shproto.v1 import coordinator_pb2

from streamhouse_segmenter import telemetry
from streamhouse_segmenter.compactor import Compactor
from streamhouse_segmenter.drain import Drain, DrainReport
from streamhouse_segmenter.ports import Ports
from streamhouse_segmenter.settings import SegmenterSettings
from streamhouse_segmenter.sweeper import OrphanSweeper, SweepReport, refusal

log = logging.getLogger(__name__)


class Segmenter:
    """`may_claim`: False while nothing may be claimed, because there is no session."""

    def __init__(
        self,
        ports: Ports,
        settings: SegmenterSettings,
        worker_id: str,
        may_claim: Callable[[], bool] = lambda: True,
    ) -> None:
        self.worker_id = worker_id
        self._ports = ports
        self._drain = Drain(ports, settings, worker_id, may_claim)
        self._compactor = Compactor(ports, settings, worker_id, may_claim)
        self._sweeper = OrphanSweeper(ports, settings)

    def close(self) -> None:
        """Starts nothing more; claimed work is finished."""
        self._drain.close()
        self._compactor.close()

    def wake(self) -> None:
        """Makes a running drain look again, as a buffer may be waiting."""
        self._drain.wake()

    async def wait_idle(self) -> None:
        """Returns once no drain of any caller is under way."""
        await self._drain.wait_idle()

    async def drain(self) -> DrainReport:
        """Builds and registers sealed buffers until none is left to claim; returns the outcomes. Raises
        StreamHouseError."""
        return await self._drain.run()

    async def apply_retention(self) -> coordinator_pb2.ApplyRetentionResponse:
        """Moves log starts by the topics' retention, and returns the coordinator's answer; the orphan sweep deletes the
        objects.

        Raises StreamHouseError.
        """
        removed = await self._ports.coordinator.apply_retention(coordinator_pb2.ApplyRetentionRequest())
        # Objects are left to the sweep: readers may have the removed segments in their plans.
        if removed.segments_removed:
            telemetry.retired_segments.add(removed.segments_removed)
            telemetry.retired_bytes.add(removed.bytes_removed)
            log.info("retention: %d segments, %d bytes", removed.segments_removed, removed.bytes_removed)
        return removed

    async def compact(self) -> int:
        """Merges small segments; returns the number of replaced segments. Raises StreamHouseError."""
        return await self._compactor.run()

    async def sweep_orphans(self) -> SweepReport:
        """Deletes unreferenced objects and returns a report. Raises StreamHouseError, StoreError."""
        report = await self._sweeper.run()
        if report.refused:
            log.error("%s", refusal(report.refused))
        return report

    async def mark_history(self) -> None:
        """Marks the position of the metadata's history in the store, so that a restored backup is noticed before a
        sweep.

        Raises StreamHouseError, StoreError.
        """
        await self._sweeper.mark_history()
