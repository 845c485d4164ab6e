"""Keeps the fences of producers: their newest epochs, per partition.

Invariant: a fence is changed under the lock of the range that its session leads. The range ends under the same lock, so
whoever leads the partition next finds the fence.
"""

from dataclasses import dataclass

from streamhouse_coordinator.core import fences
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.projection import Put
from streamhouse_coordinator.ports import Above, Transaction, where
from streamhouse_coordinator.service.common import Context, live_session, ranges_by_key


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredFence:
    """A fence as it is kept, and what older ranges say of its producer."""

    row: t.ProducerFenceRow
    older: fences.OlderStates


async def register_fence(context: Context, session_id: str, asked: fences.AskedFence) -> RegisteredFence:
    """Makes the producer epoch the newest in the partition, and returns the fence; asking again changes nothing. Raises
    SessionExpired, Fenced, ProducerFenced, Overloaded, InvalidArgument."""

    async def work(tx: Transaction) -> RegisteredFence:
        await live_session(tx, session_id)
        key = (asked.topic_id, asked.partition, asked.epoch)
        led = (await ranges_by_key(tx, [key], lock="wait")).get(key)
        fences.check_leader(led, session_id, asked.epoch)
        in_partition = where(topic_id=asked.topic_id, partition=asked.partition)
        fence_count = (await tx.totals(t.PRODUCER_FENCES, in_partition))[0].count
        rows = await tx.select(
            t.PRODUCER_FENCES, where(topic_id=asked.topic_id, partition=asked.partition, producer_id=asked.producer_id)
        )
        held = rows[0] if rows else None
        row = fences.raise_epoch(asked, held, fence_count, context.settings.producer_fences_per_partition_max)
        if row != held:
            await tx.apply([Put(t.PRODUCER_FENCES, row)])
        # The ranges first: the state at the end of a range that is complete by then is there, and stays. The other way
        # round a registration in between would complete a range whose last state was not read.
        since = where(topic_id=asked.topic_id, partition=asked.partition, epoch=Above(row.known_epoch - 1))
        ranges = await tx.select(t.RANGES, since)
        snapshots = await tx.select(t.PRODUCER_SNAPSHOTS, since)
        return RegisteredFence(row=row, older=fences.older_states(row, asked.epoch, ranges, snapshots))

    return await context.store.run(work)
