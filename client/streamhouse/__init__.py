"""StreamHouse's client. `Producer`, `Consumer`, `Admin` and `Sql` are async; `streamhouse.sync` has the same classes
for plain code.

Names are loaded on first use, so that `import streamhouse` is cheap.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from streamhouse import errors as errors
    from streamhouse import sync as sync
    from streamhouse.admin import Admin
    from streamhouse.consumer import Consumer
    from streamhouse.core.serializers import json_deserializer, json_serializer
    from streamhouse.delivery import SendFuture, SendResult, SentRecords
    from streamhouse.metrics import ConsumerMetrics, ProducerMetrics
    from streamhouse.producer import Producer
    from streamhouse.records import (
        MembershipState,
        OffsetAndMetadata,
        Record,
        RecordBatch,
        RecordMetadata,
        TopicPartition,
    )
    from streamhouse.sql import LiveColumns, Sql, SqlResult, SqlStats

_MODULES = {
    "Admin": "admin",
    "Consumer": "consumer",
    "ConsumerMetrics": "metrics",
    "LiveColumns": "sql",
    "MembershipState": "records",
    "OffsetAndMetadata": "records",
    "Producer": "producer",
    "ProducerMetrics": "metrics",
    "Record": "records",
    "RecordBatch": "records",
    "RecordMetadata": "records",
    "SendFuture": "delivery",
    "SendResult": "delivery",
    "SentRecords": "delivery",
    "Sql": "sql",
    "SqlResult": "sql",
    "SqlStats": "sql",
    "TopicPartition": "records",
    "json_deserializer": "core.serializers",
    "json_serializer": "core.serializers",
}
# For `except streamhouse.errors.NotLeader` and `streamhouse.sync.Producer` after `import streamhouse` alone.
_PACKAGES = ("errors", "sync")

__all__ = [
    "Admin",
    "Consumer",
    "ConsumerMetrics",
    "LiveColumns",
    "MembershipState",
    "OffsetAndMetadata",
    "Producer",
    "ProducerMetrics",
    "Record",
    "RecordBatch",
    "RecordMetadata",
    "SendFuture",
    "SendResult",
    "SentRecords",
    "Sql",
    "SqlResult",
    "SqlStats",
    "TopicPartition",
    "json_deserializer",
    "json_serializer",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _PACKAGES:
        return import_module(f"{__name__}.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *_PACKAGES, "__version__"])
