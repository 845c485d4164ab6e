"""The client for plain code: the same `Producer`, `Consumer`, `Admin` and `Sql`, without async.

All objects share an event loop on a background thread, and each may be used by several threads at once.
"""

from streamhouse.consumer import Consumer as _AsyncConsumer
from streamhouse.producer import Producer as _AsyncProducer
from streamhouse.sync.admin import Admin
from streamhouse.sync.consumer import Consumer
from streamhouse.sync.producer import Producer, SendFuture, SendResult
from streamhouse.sync.signatures import show_options
from streamhouse.sync.sql import Sql, SqlResult

show_options(Consumer, _AsyncConsumer)
show_options(Producer, _AsyncProducer)

__all__ = ["Admin", "Consumer", "Producer", "SendFuture", "SendResult", "Sql", "SqlResult"]
