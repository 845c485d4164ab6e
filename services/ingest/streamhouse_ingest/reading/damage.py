"""Batches that were acknowledged and cannot be read back from the log any more, found while the agent runs.

They are cut out of their buffer: what is left is announced anew, so that its registration goes on; the gap is reported
to the coordinator, which puts it on record when registration reaches it. Nothing is passed over in silence: whoever
reads there, or waits for a durable acknowledgement of it, gets DataLoss.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence

from streamhouse_ingest.log.buffer import Buffer, WalPosition
from streamhouse_ingest.log.logs import HeldLog, Logs
from streamhouse_ingest.metrics import IngestMetrics
from streamhouse_ingest.ports import BatchReader, WalFileGone
from streamhouse_ingest.sealing.sealer import Sealer

log = logging.getLogger(__name__)


class Damage:
    """`report`: tells the coordinator of new gaps, soon."""

    def __init__(
        self, logs: Logs, reader: BatchReader, sealer: Sealer, metrics: IngestMetrics, report: Callable[[], None]
    ) -> None:
        self._logs = logs
        self._reader = reader
        self._sealer = sealer
        self._metrics = metrics
        self._report = report
        self._one_at_a_time = asyncio.Lock()  # of those who meet the same damage only the first has something to do

    async def report_corruption(self, held: HeldLog, position: WalPosition) -> None:
        """A batch could not be read back. All of its buffer is looked at again: where one is damaged more may be."""
        async with self._one_at_a_time:
            buffer = self._sealed_with(held, position)
            if buffer is None:
                return
            try:
                damaged = await asyncio.to_thread(self._reader.find_damaged, buffer.on_disk_only())
            except WalFileGone:
                return  # registered meanwhile
            if damaged and self._logs.get(held.log.key) is held and buffer in held.log.sealed:
                self._cut_out(held, buffer, damaged)

    def _sealed_with(self, held: HeldLog, position: WalPosition) -> Buffer | None:
        """An open buffer is sealed for it."""
        if held.log.open is not None and held.log.open.holds(position):
            self._sealer.seal_alone(held)
        return next((buffer for buffer in held.log.sealed if buffer.holds(position)), None)

    def _cut_out(self, held: HeldLog, buffer: Buffer, damaged: Sequence[WalPosition]) -> None:
        left = self._logs.cut_out(held, buffer, frozenset(damaged))
        self._metrics.damaged.add(len(damaged))
        log.error(
            "%s: %d batches of offsets %d to %d are damaged in the log, the first in file %d at byte %d; %d parts of "
            "their buffer are left and announced anew",
            held.log.describe(),
            len(damaged),
            buffer.base_offset,
            buffer.end_offset,
            damaged[0].file,
            damaged[0].at,
            len(left),
        )
        self._sealer.announce_again([(held, part) for part in left])
        self._report()
