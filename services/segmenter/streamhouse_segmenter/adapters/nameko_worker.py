"""Wakes the segmenter by RabbitMQ: a nameko service in this process, the only file that knows nameko.

Workers of all processes compete for the coordinator's BufferSealed events (SERVICE_POOL, durable quorum queue). A
message is only a hint: the work itself is claimed from the coordinator, so a message lost or delivered twice changes
nothing, and the periodic scan (adapters/loop_worker.py) goes on without RabbitMQ. Needs eventlet's asyncio hub and
patches, see __main__.py.
"""

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from typing import Any, ClassVar

import eventlet
from eventlet.asyncio import spawn_for_awaitable
from kombu.entity import Exchange, Queue
from nameko.containers import ServiceContainer
from nameko.events import SERVICE_POOL, EventHandler
from nameko.messaging import QueueConsumer
from shproto.errors import StreamHouseError
from shproto.events import BufferSealed

from streamhouse_segmenter import telemetry
from streamhouse_segmenter.service import Segmenter
from streamhouse_segmenter.settings import SegmenterSettings

log = logging.getLogger(__name__)

# A message that fails this often is set aside for an operator, instead of being lost or spinning.
DELIVERY_LIMIT = 5
DEAD_LETTER_EXCHANGE = "streamhouse.dead-letters"
DEAD_LETTER_QUEUE = "streamhouse.dead-letters"
# Old hints are useless: the oldest go first.
DEAD_LETTERS_MAX = 10_000
# After an outage RabbitMQ is found again within 5 s (kombu's own default is 30).
RECONNECT_S_MAX = 5
# Wait before a container that died (a blocked hub, a refused queue) is started again.
RESTART_S = 2
STOP_POLL_S = 0.05


# kombu and nameko come without types.
_exchange: Any = Exchange
_queue: Any = Queue


class DeadLetteringConsumer(QueueConsumer):  # type: ignore[misc]
    """Declares the dead-letter queue before the queues that name it, at every (re)connection."""

    # Of the only container that a process has at a time.
    connected: ClassVar[bool] = False

    @contextlib.contextmanager
    def establish_connection(self) -> Iterator[Any]:
        with self.create_connection() as connection:
            connection.ensure_connection(self.on_connection_error, interval_start=1, interval_max=RECONNECT_S_MAX)
            yield connection

    def on_connection_error(self, exc: Exception, interval: float) -> None:
        DeadLetteringConsumer.connected = False
        log.warning("no RabbitMQ, the periodic scan goes on; next try in %g s: %s", interval, exc)

    def on_consume_ready(self, connection: Any, channel: Any, consumers: Any, **kwargs: Any) -> None:
        DeadLetteringConsumer.connected = True
        log.info("listening for %s events", BufferSealed.__name__)
        super().on_consume_ready(connection, channel, consumers, **kwargs)

    def get_consumers(self, consumer_cls: Any, channel: Any) -> Any:
        exchange = _exchange(DEAD_LETTER_EXCHANGE, "fanout", durable=True)
        arguments = {"x-queue-type": "quorum", "x-max-length": DEAD_LETTERS_MAX, "x-overflow": "drop-head"}
        _queue(DEAD_LETTER_QUEUE, exchange, durable=True, queue_arguments=arguments)(channel).declare()
        return super().get_consumers(consumer_cls, channel)

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """Sends a body that is not JSON to the dead letters at once (kombu's default acknowledges and loses it)."""
        log.error("an event that cannot be decoded goes to %s: %s", DEAD_LETTER_QUEUE, exc)
        message.reject()


class DurableEventHandler(EventHandler):  # type: ignore[misc]
    """nameko's event handler on a quorum queue with a delivery limit: a failed message is neither lost nor spins."""

    queue: Any
    queue_consumer = DeadLetteringConsumer()

    def setup(self) -> None:
        super().setup()
        plain: Any = self.queue
        self.queue = _queue(
            plain.name,
            exchange=plain.exchange,
            routing_key=plain.routing_key,
            durable=True,
            queue_arguments={
                "x-queue-type": "quorum",
                "x-delivery-limit": DELIVERY_LIMIT,
                "x-dead-letter-exchange": DEAD_LETTER_EXCHANGE,
            },
        )


on_event: Any = DurableEventHandler.decorator


class SegmenterNameko:
    """The nameko service; `segmenter` is set before the container starts."""

    name = "segmenter"
    segmenter: ClassVar[Segmenter]

    @on_event("coordinator", BufferSealed.__name__, handler_type=SERVICE_POOL, requeue_on_error=True)  # type: ignore[untyped-decorator]
    def buffer_sealed(self, message: object) -> None:
        """Drains, and keeps the message until nothing is left to claim: idle workers get the next message.

        Raises ValueError for a body that is not an event. Trouble with peers is no reason to deliver the hint again.
        """
        if not isinstance(message, dict) or message.get("type") != BufferSealed.__name__:
            raise ValueError(f"not a {BufferSealed.__name__} event: {message!r:.200}")
        telemetry.events.add(1)
        self.segmenter.wake()
        spawn_for_awaitable(_drain(self.segmenter)).wait()


async def _drain(segmenter: Segmenter) -> None:
    # An error must not pass through the green thread: eventlet would print it with a trace of its own.
    try:
        await segmenter.drain()
    except StreamHouseError as error:
        log.warning("cannot scan for buffers now, the periodic scan will: %s", error)


class NamekoWorker:
    """Runs the nameko container and starts it again whenever it dies. Losing RabbitMQ loses only the hints."""

    def __init__(self, settings: SegmenterSettings, segmenter: Segmenter) -> None:
        self._config = {
            "AMQP_URI": settings.amqp_url,
            "HEARTBEAT": settings.amqp_heartbeat_s,
            "max_workers": settings.builds_in_flight_max,
        }
        self._stop_timeout_s = settings.shutdown_timeout_ms / 1000
        SegmenterNameko.segmenter = segmenter
        self._container: ServiceContainer | None = None
        self._stopping = False
        self._supervisor: Any = None

    def start(self) -> None:
        """Returns at once; connecting goes on in the background without a limit."""
        self._supervisor = eventlet.spawn(self._supervise)

    async def stop(self) -> None:
        """Takes no more messages and waits for running handlers, unless RabbitMQ is away."""
        self._stopping = True
        stopped = asyncio.Event()
        eventlet.spawn(self._stop_container).link(lambda _: stopped.set())
        await stopped.wait()

    def _stop_container(self) -> None:
        # Without a connection there is no consumer to cancel, and nameko's stop would print nothing but traces. Running
        # handlers are waited for with the segmenter's other drains.
        if self._container is not None and DeadLetteringConsumer.connected:
            # nameko's stop waits without a limit for a connection to cancel its consumers on.
            stopping = eventlet.spawn(self._container.stop)
            waited_s = 0.0
            while not stopping.dead and DeadLetteringConsumer.connected and waited_s < self._stop_timeout_s:
                eventlet.sleep(STOP_POLL_S)
                waited_s += STOP_POLL_S
        self._supervisor.kill()

    def _supervise(self) -> None:
        while not self._stopping:
            self._container = ServiceContainer(SegmenterNameko, self._config)
            try:
                self._container.start()
                self._container.wait()
            except Exception:
                log.exception("the nameko container died, starting another in %d s", RESTART_S)
            if not self._stopping:
                eventlet.sleep(RESTART_S)
