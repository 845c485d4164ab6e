"""Lets the coordinator know that this worker is there: for `streamhouse status`. Nothing depends on it."""

import logging

from shproto.errors import StreamHouseError
from shproto.v1 import coordinator_pb2
from shruntime.tasks import Backoff

from streamhouse_segmenter.ports import Ports

log = logging.getLogger(__name__)
REOPEN_FIRST_MS = 200
REOPEN_MAX_MS = 10_000


async def keep_session(ports: Ports, agent_id: str, address: str) -> None:
    """Opens a session and renews it until cancelled, then closes it; opens another when it is gone."""
    backoff = Backoff(REOPEN_FIRST_MS, REOPEN_MAX_MS, ports.rng)
    while True:
        try:
            opened = await ports.coordinator.open_session(
                coordinator_pb2.OpenSessionRequest(agent_id=agent_id, role="segmenter", address=address)
            )
            backoff.reset()
            await _renew(ports, opened)
        except StreamHouseError as error:
            log.info("no session with the coordinator, trying again: %s", error)
        await ports.clock.sleep_ms(backoff.next_ms())


async def _renew(ports: Ports, opened: coordinator_pb2.OpenSessionResponse) -> None:
    try:
        while True:
            await ports.clock.sleep_ms(opened.heartbeat_interval_ms)
            await ports.coordinator.heartbeat(coordinator_pb2.HeartbeatRequest(session_token=opened.session_token))
    finally:
        await _close(ports, opened.session_token)


async def _close(ports: Ports, token: str) -> None:
    try:
        await ports.coordinator.close_session(coordinator_pb2.CloseSessionRequest(session_token=token))
    except StreamHouseError as error:
        log.info("session not closed, it expires by itself: %s", error)
