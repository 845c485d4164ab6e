"""Handles acknowledged batches that cannot be read back from the log any more, found while the agent runs.

Owns: the removal of damaged batches from their buffer, by a single caller at a time. Does not own: the log and its
buffers, the announcement (sealer.py).
Invariants: no damage is passed over in silence. The rest of the buffer is announced anew, so that its registration goes
on; the gap is reported to the coordinator, which records it when registration reaches it. A reader of the gap, or a
caller that waits for a durable acknowledgement in it, gets DataLoss.
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


class CorruptBatches:
    """Removes damaged batches. `report`: requests that the coordinator is told of new gaps soon."""

    def __init__(
        self, logs: Logs, reader: BatchReader, sealer: Sealer, metrics: IngestMetrics, report: Callable[[], None]
    ) -> None:
        self._logs = logs
        self._reader = reader
        self._sealer = sealer
        self._metrics = metrics
        self._report = report
        self._one_at_a_time = asyncio.Lock()  # of several readers of the same damage only the first removes it

    async def report_corruption(self, held: HeldLog, position: WalPosition) -> None:
        """Removes the batch at `position`, which could not be read back, and all other damaged batches of its buffer:
        the whole buffer is read again, because more of its batches may be damaged. Raises OSError."""
        async with self._one_at_a_time:
            buffer = self._sealed_with(held, position)
            if buffer is None:
                return
            try:
                damaged = await asyncio.to_thread(self._reader.find_damaged, buffer.on_disk_only())
            except WalFileGone:
                return  # the file was deleted, so its batches were registered meanwhile
            # Registration may have taken the buffer while it was read: records that are in a segment are not lost.
            if damaged and self._logs.get(held.log.key) is held and buffer in held.log.sealed:
                self._cut_out(held, buffer, damaged)

    def _sealed_with(self, held: HeldLog, position: WalPosition) -> Buffer | None:
        """Returns the sealed buffer that holds the batch, None if it is registered; seals an open buffer for that."""
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
