"""Wakes the worker at BufferSealed events of the coordinator's feed: embedded, or wherever there is no RabbitMQ."""

import logging
from collections.abc import Callable

from shproto.errors import StreamHouseError
from shproto.events import BufferSealed
from shproto.v1 import coordinator_pb2
from shruntime.tasks import Backoff

from streamhouse_segmenter import telemetry
from streamhouse_segmenter.ports import Ports

log = logging.getLogger(__name__)
# A broken feed costs nothing but the scan's interval: reconnect quickly, but not in a spin.
RECONNECT_FIRST_MS = 100
RECONNECT_MAX_MS = 5_000


async def follow_buffers(ports: Ports, wake: Callable[[], None]) -> None:
    """Calls `wake` at every BufferSealed from now on; runs until cancelled and reconnects by itself."""
    backoff = Backoff(RECONNECT_FIRST_MS, RECONNECT_MAX_MS, ports.rng)
    while True:
        try:
            await _follow(ports, wake, backoff)
            log.debug("the event feed ended")
        except StreamHouseError as error:
            log.info("the event feed broke, the periodic scan goes on: %s", error)
        await ports.clock.sleep_ms(backoff.next_ms())


async def _follow(ports: Ports, wake: Callable[[], None], backoff: Backoff) -> None:
    head = await ports.coordinator.get_head(coordinator_pb2.GetHeadRequest())
    wake()  # for what was sealed while nobody followed
    feed = ports.coordinator.follow_events(
        coordinator_pb2.FollowEventsRequest(after_position=head.events_position, types=[BufferSealed.__name__])
    )
    async for _ in feed:
        backoff.reset()
        telemetry.events.add(1)
        wake()
