"""Relay of the outbox: publishes every event to RabbitMQ in nameko's convention, in order, at least once.

Owns: the connection to RabbitMQ and the queued notices. Does not own: the position of the outbox, a row that a single
coordinator claims at a time.
Invariants: an absent RabbitMQ stops nothing: every receiver scans as well, and the relay continues at its position when
the broker is back. Notices of sealed buffers are published by the coordinator that received them, at most once: a late
notice is of no use.
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

EXCHANGE = "coordinator.events"  # nameko's exchange for events of a service called `coordinator`
BACKOFF_FIRST_MS, BACKOFF_MS_MAX = 100, 10_000
# Notices that wait to be published; beyond that the oldest are dropped. A single notice drains all waiting buffers.
NOTICES_MAX = 100

_BROKER_AWAY = (AMQPError, AMQPException, ChannelInvalidStateError, OSError, TimeoutError)

_published = counter(
    metrics.get_meter("streamhouse.coordinator"),
    "streamhouse_coordinator_published_total",
    "events published to RabbitMQ",
)

# Publishes the next batch and moves the outbox past it (PostgresStore.drain_outbox); returns the number of its events.
Drain = Callable[[Callable[[Sequence[EventRow]], Awaitable[None]], int], Awaitable[int]]


def message_of(row: EventRow) -> aio_pika.Message:
    """Returns the message for nameko's event handlers: a JSON object, which the handler gets as payload."""
    return _message(
        position=row.position,
        kind=row.type,
        payload=row.payload,
        trace_context=row.trace_context,
        message_id=str(row.position),
    )


def notice_of(sealed: BufferSealed, trace_context: str) -> aio_pika.Message:
    """Returns the message of a notice, as for an event at position 0."""
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
    """Publishes until cancelled. `drain` is the store's part.

    Invariants: the pauses between tries grow until events were drained, whichever of PostgreSQL and RabbitMQ is away. A
    connection to RabbitMQ is kept while only PostgreSQL is away. The beginning and the end of an outage are logged
    once.
    """

    def __init__(self, url: str, feed: Feed, drain: Drain, *, batch: int, timeout_ms: int) -> None:
        self._url = url
        self._feed = feed
        self._drain = drain
        self._batch = batch
        self._timeout_s = timeout_ms / 1000
        self._backoff = Backoff(BACKOFF_FIRST_MS, BACKOFF_MS_MAX)
        self._publishes: bool | None = None  # None before the first try
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
        """Publishes events and notices for ever. Raises the error that ended either."""
        self._notices.clear()  # notices from the time without a broker are outdated
        await run_until_first_ends(
            {"publish events": self._publish_all(exchange), "publish notices": self._publish_notices(exchange)}
        )

    async def _publish_all(self, exchange: Any) -> None:
        publish = partial(self._publish, exchange)
        while True:
            # Before the drain: events that arrive during it end the wait below at once.
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
                # Only the coordinator with the claim publishes: this one may have nothing to publish during its life.
                log.info("ready to publish events to RabbitMQ")
            await self._feed.moved_beyond(position)

    async def _publish(self, exchange: Any, rows: Sequence[EventRow]) -> None:
        async with asyncio.timeout(self._timeout_s):
            # Sent in order; the confirmations may arrive together.
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
