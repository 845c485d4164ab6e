"""The outbox: publishes every event to RabbitMQ in nameko's convention, in order, at least once.

Its place is a row that only one coordinator claims at a time. RabbitMQ being away stops nothing: whoever listens also
scans, and the outbox goes on from its place when the broker is back. Notices of sealed buffers are published by the
coordinator that has heard of them, at most once: what the broker does not take at once is of no use later.
"""

import asyncio
import json
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import aio_pika
from aio_pika.exceptions import AMQPError, AMQPException, ChannelInvalidStateError
from opentelemetry import metrics
from shproto.errors import StreamHouseError
from shproto.events import BufferSealed
from shruntime.counters import counter
from shruntime.tasks import Backoff, outcomes, run_until_first_ends

from streamhouse_coordinator.core.tables import EventRow
from streamhouse_coordinator.feed import Feed

log = logging.getLogger(__name__)

EXCHANGE = "coordinator.events"  # nameko's name for the events of a service called `coordinator`
BACKOFF_FIRST_MS, BACKOFF_MS_MAX = 100, 10_000
# Notices that wait to be published; beyond it the oldest go. One drains all buffers there are.
NOTICES_MAX = 100

_BROKER_AWAY = (AMQPError, AMQPException, ChannelInvalidStateError, OSError, TimeoutError)

_published = counter(
    metrics.get_meter("streamhouse.coordinator"),
    "streamhouse_coordinator_published_total",
    "events published to RabbitMQ",
)

# Publishes the next batch and moves the outbox past it (PostgresStore.drain_outbox); returns how many events it has.
Drain = Callable[[Callable[[Sequence[EventRow]], Awaitable[None]], int], Awaitable[int]]


def message_of(row: EventRow) -> aio_pika.Message:
    """The event as nameko's event handlers take it: one JSON object, passed to the handler as its payload."""
    return _message(
        position=row.position,
        kind=row.type,
        payload=row.payload,
        trace_context=row.trace_context,
        message_id=str(row.position),
    )


def notice_of(sealed: BufferSealed, trace_context: str) -> aio_pika.Message:
    """Returns the notice's message, as if it were of an event at no position."""
    return _message(
        position=0,
        kind=BufferSealed.__name__,
        payload=sealed.to_json(),
        trace_context=trace_context,
        message_id=sealed.buffer_id,
    )


def _message(*, position: int, kind: str, payload: str, trace_context: str, message_id: str) -> aio_pika.Message:
    body = {"position": position, "type": kind, "payload": json.loads(payload), "trace_context": trace_context}
    return aio_pika.Message(
        json.dumps(body, separators=(",", ":")).encode(),
        content_type="application/json",
        content_encoding="utf-8",
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        message_id=message_id,
    )


class Relay:
    """`run` publishes for ever. `drain` is the store's side of it.

    Invariants: tries come at growing intervals until events were drained, whichever of PostgreSQL and RabbitMQ is away.
    A connection to RabbitMQ is kept while only PostgreSQL is away. An outage is told once, and so is its end.
    """

    def __init__(self, url: str, feed: Feed, drain: Drain, *, batch: int, timeout_ms: int) -> None:
        self._url = url
        self._feed = feed
        self._drain = drain
        self._batch = batch
        self._timeout_s = timeout_ms / 1000
        self._backoff = Backoff(BACKOFF_FIRST_MS, BACKOFF_MS_MAX)
        self._publishes: bool | None = None  # not known before the first try
        self._notices: deque[tuple[BufferSealed, str]] = deque(maxlen=NOTICES_MAX)
        self._noticed = asyncio.Event()

    def sealed(self, sealed: BufferSealed, trace_context: str) -> None:
        """Queues the notice that a buffer may be claimed."""
        self._notices.append((sealed, trace_context))
        self._noticed.set()

    async def run(self) -> None:
        while True:
            try:
                connection = await aio_pika.connect(self._url, timeout=self._timeout_s)
                async with connection:
                    await self._publish_both(await self._exchange(connection))
            except _BROKER_AWAY as error:
                await self._back_off(error)

    async def _exchange(self, connection: Any) -> Any:
        async with asyncio.timeout(self._timeout_s):
            channel = await connection.channel(publisher_confirms=True)
            return await channel.declare_exchange(EXCHANGE, aio_pika.ExchangeType.TOPIC, durable=True)

    async def _publish_both(self, exchange: Any) -> None:
        """Publishes events and notices for ever. Raises what ended one of the two."""
        self._notices.clear()  # of while the broker was away
        await run_until_first_ends(
            {"publish events": self._publish_all(exchange), "publish notices": self._publish_notices(exchange)}
        )

    async def _publish_all(self, exchange: Any) -> None:
        publish = partial(self._publish, exchange)
        while True:
            position = self._feed.position
            try:
                while await self._drain(publish, self._batch) == self._batch:
                    pass
            except StreamHouseError as error:
                await self._back_off(error)
                continue
            self._backoff.reset()
            if not self._publishes:
                self._publishes = True
                # Of several coordinators one has the claim: this one may have nothing to publish as long as it lives.
                log.info("ready to publish events to RabbitMQ")
            await self._feed.moved_beyond(position)

    async def _publish(self, exchange: Any, rows: Sequence[EventRow]) -> None:
        async with asyncio.timeout(self._timeout_s):
            # Sent in order; the confirmations may come together.
            sent = (exchange.publish(message_of(row), row.type, mandatory=False) for row in rows)
            confirmed = await outcomes(*sent)
        for outcome in confirmed:
            if isinstance(outcome, BaseException):
                raise outcome
        _published.add(len(rows))

    async def _back_off(self, error: Exception) -> None:
        level = logging.DEBUG if self._publishes is False else logging.WARNING
        log.log(level, "not publishing events for now: %s", error or type(error).__name__)
        self._publishes = False
        await asyncio.sleep(self._backoff.next_ms() / 1000)

    async def _publish_notices(self, exchange: Any) -> None:
        while True:
            await self._noticed.wait()
            self._noticed.clear()
            while self._notices:
                notice = notice_of(*self._notices.popleft())
                async with asyncio.timeout(self._timeout_s):
                    await exchange.publish(notice, BufferSealed.__name__, mandatory=False)
