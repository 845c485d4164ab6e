"""Wakes the worker at events of the coordinator's feed: sealed buffers, and lost workers, whose claims are free."""

import logging
from collections.abc import Callable, Sequence

from shproto.errors import StreamHouseError
from shproto.events import BufferSealed, SessionClosed, event_from_json
from shproto.v1 import coordinator_pb2
from shruntime.tasks import Backoff

from streamhouse_segmenter import telemetry
from streamhouse_segmenter.ports import Ports

log = logging.getLogger(__name__)
# A broken feed costs no more than the scan's interval: reconnect quickly, but without spinning.
FEED_RETRY_FIRST_MS = 100
FEED_RETRY_MS_MAX = 5_000

BUFFERS_AND_WORKERS = (BufferSealed.__name__, SessionClosed.__name__)
WORKERS = (SessionClosed.__name__,)


async def follow_events(ports: Ports, types: Sequence[str], wake: Callable[[], None], session_token: str = "") -> None:
    """Calls `wake` at every event of these types from now on; runs until cancelled and reconnects by itself.

    `session_token`: session that the coordinator checks when the stream breaks, or empty.
    """
    backoff = Backoff(FEED_RETRY_FIRST_MS, FEED_RETRY_MS_MAX, ports.rng)
    while True:
        try:
            await _follow(ports, types, wake, session_token, backoff)
            log.debug("the event feed ended")
        except StreamHouseError as error:
            log.info("the event feed broke, the periodic scan goes on: %s", error)
        # Also after a feed that ended without an error, as of a coordinator that stops.
        await ports.clock.sleep_ms(backoff.next_ms())


async def _follow(
    ports: Ports, types: Sequence[str], wake: Callable[[], None], session_token: str, backoff: Backoff
) -> None:
    # Before the wake: a buffer sealed in between is found by the scan, or its notice is on the feed.
    head = await ports.coordinator.get_head(coordinator_pb2.GetHeadRequest())
    wake()  # for buffers sealed while the stream was down
    feed = ports.coordinator.follow_events(
        coordinator_pb2.FollowEventsRequest(
            after_position=head.events_position, types=types, session_token=session_token
        )
    )
    async for row in feed:
        backoff.reset()
        if row.type == BufferSealed.__name__:
            telemetry.events.add(1)
            wake()
        elif _frees_claims(row):
            wake()


def _frees_claims(row: coordinator_pb2.Event) -> bool:
    event = event_from_json(row.type, row.payload_json)
    return isinstance(event, SessionClosed) and event.role == "segmenter"
