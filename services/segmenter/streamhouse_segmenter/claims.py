"""Keeps a claim alive while its work goes on, and stops the work when the claim is lost.

A lost claim is no danger (registration is a compare-and-set), only wasted work that another worker repeats.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from shproto.errors import Fenced, StreamHouseError
from shproto.v1 import coordinator_pb2
from shruntime.clock import Clock
from shruntime.tasks import Backoff, cancel_and_wait, retry

from streamhouse_segmenter.ports import Ports
from streamhouse_segmenter.settings import SegmenterSettings

log = logging.getLogger(__name__)
ResultT = TypeVar("ResultT")
# Two renewals may fail before the claim runs out.
RENEWALS_PER_TTL = 3


class ClaimLost(Exception):
    """The claim is lost: another worker may hold it now."""


async def hold_claim(
    ports: Ports, claim_id: str, ttl_ms: int, work: Coroutine[Any, Any, ResultT], ends_it: Callable[[], bool]
) -> ResultT:
    """Returns the result of `work`, which runs while the claim is renewed; raises ClaimLost if renewing fails.

    Registration ends a claim, and the answer of a renewal may overtake the registration's. `ends_it` returns True if
    the work may have ended the claim by itself: then the work goes on without a claim, to receive that answer.
    """
    working = asyncio.create_task(work, name=f"work on claim {claim_id}")
    renewing = asyncio.create_task(_renew(ports, claim_id, ttl_ms, ends_it), name=f"renew claim {claim_id}")
    try:
        await asyncio.wait((working, renewing), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            # Raises ClaimLost. Without an error the work itself has ended the claim, and its answer is under way.
            renewing.result()
            await asyncio.wait((working,))
        return working.result()
    finally:
        await cancel_and_wait(working, renewing)


async def _renew(ports: Ports, claim_id: str, ttl_ms: int, ends_it: Callable[[], bool]) -> None:
    """Renews the claim; returns once the work may have ended it. Raises ClaimLost."""
    clock: Clock = ports.clock
    expires_ms = clock.monotonic_ms() + ttl_ms
    while True:
        await clock.sleep_ms(ttl_ms / RENEWALS_PER_TTL)
        # Before the call: the coordinator counts from a later moment, so this side never believes in a claim for too
        # long.
        asked_ms = clock.monotonic_ms()
        try:
            await ports.coordinator.renew_claim(
                coordinator_pb2.RenewClaimRequest(claim_id=claim_id, claim_ttl_ms=ttl_ms)
            )
        except Fenced as error:
            if ends_it():
                log.debug("claim %s has ended, most likely by its registration", claim_id)
                return
            raise ClaimLost(f"claim {claim_id} is lost: {error.message}") from error
        except StreamHouseError as error:
            if not error.retriable or asked_ms >= expires_ms:
                raise ClaimLost(f"claim {claim_id} could not be renewed: {error}") from error
            log.warning("claim %s not renewed yet: %s", claim_id, error)
        else:
            expires_ms = asked_ms + ttl_ms


async def declare_uploads(ports: Ports, settings: SegmenterSettings, claim_id: str, object_keys: Sequence[str]) -> None:
    """Declares objects to the coordinator; required before the first of them is uploaded.

    Repeats until answered, or until the loss of the claim cancels it. Raises Fenced, and other errors that a repetition
    cannot mend.
    """
    request = coordinator_pb2.DeclareUploadsRequest(claim_id=claim_id, object_keys=object_keys)
    backoff = Backoff(settings.handover_retry_first_ms, settings.handover_retry_max_ms, ports.rng)

    def is_final(error: StreamHouseError) -> bool:
        if error.retriable:
            log.warning("claim %s: uploads not declared yet: %s", claim_id, error)
        return not error.retriable

    await retry(lambda: ports.coordinator.declare_uploads(request), backoff, is_final, ports.clock.sleep_ms)


async def release_claim(ports: Ports, claim_id: str, *, reason: str = "", retry_after_ms: int = 0) -> None:
    """Gives the claim back. Without an answer, or for a claim that is already gone, nothing changes: claims run out."""
    request = coordinator_pb2.ReleaseClaimRequest(claim_id=claim_id, reason=reason, retry_after_ms=retry_after_ms)
    try:
        await ports.coordinator.release_claim(request)
    except StreamHouseError as error:
        log.warning("claim %s not released (%s): it runs out by itself", claim_id, error)
