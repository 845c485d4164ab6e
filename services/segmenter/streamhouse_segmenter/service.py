"""What a segmenter can be asked to do, as plain coroutines: whoever drives it (an event loop, nameko, a test)
calls these. Each may run in any number of processes at once."""

import logging
from collections.abc import Callable

from shproto.v1 import coordinator_pb2

from streamhouse_segmenter import telemetry
from streamhouse_segmenter.compactor import Compactor
from streamhouse_segmenter.drain import Drain, DrainReport
from streamhouse_segmenter.ports import Ports
from streamhouse_segmenter.settings import SegmenterSettings
from streamhouse_segmenter.sweeper import Sweeper, SweepReport, refusal

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
        self._sweeper = Sweeper(ports, settings)

    def close(self) -> None:
        """Starts nothing more; what is in hand is finished."""
        self._drain.close()
        self._compactor.close()

    def wake(self) -> None:
        """There may be a buffer to claim: a drain that runs looks again."""
        self._drain.wake()

    async def wait_idle(self) -> None:
        """Until no drain is under way, whoever called it."""
        await self._drain.wait_idle()

    async def drain(self) -> DrainReport:
        """Builds and registers sealed buffers until none is left to claim. Raises StreamHouseError."""
        return await self._drain.run()

    async def apply_retention(self) -> coordinator_pb2.ApplyRetentionResponse:
        """Moves log starts as the topics' retention says; the objects go with the orphan sweep.
        Raises StreamHouseError."""
        removed = await self._ports.coordinator.apply_retention(coordinator_pb2.ApplyRetentionRequest())
        if removed.segments_removed:
            telemetry.retired_segments.add(removed.segments_removed)
            telemetry.retired_bytes.add(removed.bytes_removed)
            log.info("retention: %d segments, %d bytes", removed.segments_removed, removed.bytes_removed)
        return removed

    async def compact(self) -> int:
        """Merges small segments; returns how many were replaced. Raises StreamHouseError."""
        return await self._compactor.run()

    async def sweep_orphans(self) -> SweepReport:
        """Deletes objects that no segment refers to. Raises StreamHouseError, StoreError."""
        report = await self._sweeper.run()
        if report.refused:
            log.error("%s", refusal(report.refused))
        return report

    async def mark_history(self) -> None:
        """Notes where the metadata's history stands, so that a restored backup is noticed before a sweep.
        Raises StreamHouseError, StoreError."""
        await self._sweeper.mark_history()
