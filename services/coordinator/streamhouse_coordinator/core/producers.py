"""Decides on named producers: which epoch a writer gets that takes one over. Pure."""

from collections.abc import Collection

from shformat.limits import UINT32_MAX
from shproto.errors import Overloaded, UnknownProducer
from shproto.events import ProducerDeleted, ProducerInitialized
from shproto.limits import NAME_LENGTH_MAX

from streamhouse_coordinator.core.names import check_name
from streamhouse_coordinator.core.tables import NamedProducerRow

# Epoch 0 is that of producers that do not fence.
FIRST_NAMED_EPOCH = 1


def check_producer_name(name: str) -> None:
    """Checks the name of a producer. Raises InvalidArgument."""
    check_name("name", name, NAME_LENGTH_MAX)


def take_over(held: NamedProducerRow, producer_ids_from: int, now_ms: int) -> ProducerInitialized:
    """Returns the event of the next epoch. Raises UnknownProducer for an id from before a restore, whose batches no
    agent takes, and Overloaded for an epoch beyond 32 bits."""
    if held.producer_id < producer_ids_from:
        raise UnknownProducer(
            f"producer {held.name!r} is from before the metadata was restored, so what it wrote last is not known. "
            "Compare its stream with the topic, then delete the producer, or take another name",
            name=held.name,
            producer_id=held.producer_id,
            producer_ids_from=producer_ids_from,
        )
    if held.producer_epoch >= UINT32_MAX:
        raise Overloaded(
            f"producer {held.name!r} has had all {UINT32_MAX} epochs", limit=UINT32_MAX, value=held.producer_epoch
        )
    return ProducerInitialized(
        name=held.name,
        producer_id=held.producer_id,
        producer_epoch=held.producer_epoch + 1,
        initialized_ms=now_ms,
    )


def begin(name: str, producer_id: int, count: int, producers_max: int, now_ms: int) -> ProducerInitialized:
    """Returns the event of a new name. Raises Overloaded if there are too many."""
    if count >= producers_max:
        raise Overloaded(
            f"{count} producers have a name; the limit named_producers_max is {producers_max}",
            limit=producers_max,
            value=count,
        )
    return ProducerInitialized(
        name=name, producer_id=producer_id, producer_epoch=FIRST_NAMED_EPOCH, initialized_ms=now_ms
    )


def delete(name: str, rows: Collection[NamedProducerRow], now_ms: int) -> ProducerDeleted:
    """Returns the event of a deleted producer. Raises UnknownProducer."""
    for row in rows:
        return ProducerDeleted(row.name, row.producer_id, now_ms)
    raise UnknownProducer(f"there is no producer {name!r}", name=name)
