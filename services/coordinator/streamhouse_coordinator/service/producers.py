"""Allocates producer ids, and hands named producers from one writer to the next."""

from shproto.events import ProducerInitialized

from streamhouse_coordinator.core import producers
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.ports import Transaction, where
from streamhouse_coordinator.service.common import Context

# Two writers that take a name over at the same time must get different epochs, and the number of names has a limit.
PRODUCERS_LOCK = "producers"


async def init_producer(context: Context, name: str) -> ProducerInitialized:
    """Makes the caller the newest holder of a named producer; returns its id and epoch. Raises InvalidArgument,
    UnknownProducer, Overloaded."""
    producers.check_producer_name(name)
    if (event := await _take_over(context, name, None)) is not None:
        return event
    # Outside of the transaction: an id has to be allocated for good, whatever becomes of the transaction.
    event = await _take_over(context, name, await context.store.next_producer_id())
    assert event is not None, "a new id makes a new producer"
    return event


async def _take_over(context: Context, name: str, new_id: int | None) -> ProducerInitialized | None:
    """Returns the event of the next epoch. A name that is new begins with `new_id`; without an id, returns None."""

    async def work(tx: Transaction) -> ProducerInitialized | None:
        rows = await tx.select(t.NAMED_PRODUCERS, where(name=name))
        now_ms = await tx.now_ms()
        if rows:
            history = (await tx.select(t.HISTORIES, order=("nth",)))[-1]
            event = producers.take_over(rows[0], history.producer_ids_from, now_ms)
        elif new_id is not None:
            count = (await tx.totals(t.NAMED_PRODUCERS, where()))[0].count
            event = producers.begin(name, new_id, count, context.settings.named_producers_max, now_ms)
        else:
            return None
        await tx.append([event])
        return event

    return await context.store.run(work, lock=PRODUCERS_LOCK)


async def delete_producer(context: Context, name: str) -> int:
    """Frees a producer's name and returns its id. Raises InvalidArgument, UnknownProducer."""
    producers.check_producer_name(name)

    async def work(tx: Transaction) -> int:
        rows = await tx.select(t.NAMED_PRODUCERS, where(name=name))
        event = producers.delete(name, rows, await tx.now_ms())
        await tx.append([event])
        return event.producer_id

    return await context.store.run(work, lock=PRODUCERS_LOCK)
