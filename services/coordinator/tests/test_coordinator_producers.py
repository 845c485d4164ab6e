"""Decisions on named producers."""

import pytest
from shformat.limits import UINT32_MAX
from shproto.errors import Overloaded, UnknownProducer
from shproto.events import ProducerInitialized
from streamhouse_coordinator.core import producers
from streamhouse_coordinator.core.tables import NamedProducerRow

pytestmark = pytest.mark.quick


def held(*, producer_epoch: int = 3) -> NamedProducerRow:
    return NamedProducerRow(name="sink", producer_id=7, producer_epoch=producer_epoch, initialized_ms=1)


def test_the_id_stays_and_the_epoch_grows() -> None:
    first = ProducerInitialized(name="sink", producer_id=7, producer_epoch=1, initialized_ms=5)
    assert producers.begin("sink", 7, 0, 1, 5) == first
    fourth = ProducerInitialized(name="sink", producer_id=7, producer_epoch=4, initialized_ms=9)
    assert producers.take_over(held(), 0, 9) == fourth


def test_after_a_restore_the_name_is_refused_until_it_is_deleted() -> None:
    """Agents take no batch of such an id, and a new id would begin at sequence 0: everything would be written twice."""
    with pytest.raises(UnknownProducer, match="from before the metadata was restored") as refused:
        producers.take_over(held(), 8, 9)
    assert refused.value.details == {"name": "sink", "producer_id": "7", "producer_ids_from": "8"}


def test_epochs_have_32_bits() -> None:
    with pytest.raises(Overloaded):
        producers.take_over(held(producer_epoch=UINT32_MAX), 0, 9)
