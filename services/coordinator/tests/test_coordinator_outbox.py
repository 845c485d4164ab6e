"""Events as RabbitMQ messages, in the form nameko's event handlers take."""

import json

import pytest
from streamhouse_coordinator.adapters.rabbitmq import EXCHANGE, message_of
from streamhouse_coordinator.core.tables import EventRow

pytestmark = pytest.mark.quick


def test_the_message_of_an_event() -> None:
    row = EventRow(
        position=7,
        stream_id="buffer/b",
        version=1,
        type="BufferSealed",
        payload='{"buffer_id":"b","slices":[]}',
        trace_context="00-trace-01",
        created_ms=123,
    )
    message = message_of(row)
    assert json.loads(message.body) == {
        "position": 7,
        "type": "BufferSealed",
        "payload": {"buffer_id": "b", "slices": []},
        "trace_context": "00-trace-01",
    }
    assert (message.content_type, message.content_encoding) == ("application/json", "utf-8")
    assert message.delivery_mode == 2, "persistent"
    assert message.message_id == "7", "for whoever wants to know a repeat"
    assert EXCHANGE == "coordinator.events"
