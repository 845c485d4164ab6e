"""A claimed buffer on its way: pull, build, upload, register, release. Every step may be cut off and repeated.

Owns: the order of the steps and the reaction to a failure. Does not own: the choice of the next buffer (drain.py).
Before registration nothing is visible; registration is the coordinator's compare-and-set. Invariants: objects are
declared before they are uploaded (decision 0007): an object whose registration never happened is an orphan that the
sweep removes, and an object that the sweep has taken cannot be registered any more.
"""

import asyncio
import logging
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from shformat import FormatError
from shproto.errors import Fenced, StreamHouseError
from shproto.v1 import coordinator_pb2, types_pb2
from shruntime.tasks import Backoff, cancel_and_wait, retry_after_ms
from shruntime.telemetry import context_of, current_traceparent
from shstore import REFUSALS, StoreError

from streamhouse_segmenter import telemetry
from streamhouse_segmenter.builder import BuildTooLarge, BuiltObject, ObjectBuilder
from streamhouse_segmenter.claims import ClaimLost, declare_uploads, hold_claim, release_claim
from streamhouse_segmenter.core.plan import BufferSlice, SliceMismatch, plan_objects, still_early
from streamhouse_segmenter.ports import Ports
from streamhouse_segmenter.settings import SegmenterSettings

log = logging.getLogger(__name__)
WITHDRAWN = coordinator_pb2.REGISTRATION_RESULT_WITHDRAWN


class RegistrationLate(Exception):
    """The segments could not be registered in time: a predecessor is missing, or the coordinator."""


class UploadWithdrawn(Exception):
    """The sweep has taken an object for an orphan, because its registration came so late: it must be built again."""


class HandoverOutcome(StrEnum):
    REGISTERED = "registered"
    FAILED = "failed"
    CLAIM_LOST = "claim_lost"


@dataclass(frozen=True, slots=True)
class HandoverResult:
    """Outcome of a buffer. After a failure: `retry_after_ms` until the buffer can be claimed again; `by_store`, True
    if an upload failed."""

    outcome: HandoverOutcome
    retry_after_ms: int = 0
    by_store: bool = False


class Handover:
    """Works off a claimed buffer; for one use."""

    def __init__(self, ports: Ports, settings: SegmenterSettings, claim: coordinator_pb2.ClaimBufferResponse) -> None:
        self._ports = ports
        self._settings = settings
        self._claim = claim
        self._builder = ObjectBuilder(ports, settings, claim)
        self._early: list[types_pb2.SegmentRef] = []
        self._objects_left = 0  # not uploaded yet
        self._unanswered = False  # a registration was sent, and its outcome is unknown
        self._claim_over = False
        self._traceparent = claim.trace_context

    async def run(self, built: Callable[[], None]) -> HandoverResult:
        """Registers the buffer, or gives it back; returns the outcome. Calls `built` once no more memory is needed.

        Raises nothing but CancelledError, after which the claim runs out by itself.
        """
        started_ms = self._ports.clock.monotonic_ms()
        try:
            await hold_claim(
                self._ports, self._claim.claim_id, self._settings.claim_ttl_ms, self._work(built), self._ends_claim
            )
        except (ClaimLost, Fenced) as error:
            log.warning("buffer %s: %s", self._claim.buffer_id, error)
            result = HandoverResult(HandoverOutcome.CLAIM_LOST)
            _let_go(error)
        except Exception as error:  # noqa: BLE001 - whatever it was, the buffer must go back and be tried again
            result = await self._give_back(error)
            _let_go(error)
        else:
            telemetry.handover_ms.record(self._ports.clock.monotonic_ms() - started_ms)
            result = HandoverResult(HandoverOutcome.REGISTERED)
        telemetry.buffers.add(1, {"outcome": result.outcome.value})
        return result

    def _ends_claim(self) -> bool:
        """True if the claim, which is over, may have been ended by the registration of the buffer's last segment."""
        # hold_claim asks only once a renewal was refused, so the claim is over for certain.
        self._claim_over = True
        return self._objects_left == 0 and (self._unanswered or not self._early)

    async def _work(self, built: Callable[[], None]) -> None:
        plan = plan_objects(self._claim.slices, self._settings.slices_together_bytes)
        # All keys are drawn before the first build, so a single call declares every object of the buffer.
        objects = {self._builder.new_key(slices): slices for slices in plan}
        self._objects_left = len(objects)
        # While the first object is being built: the declaration costs no time.
        declaring = asyncio.create_task(
            declare_uploads(self._ports, self._settings, self._claim.claim_id, list(objects)), name="declare uploads"
        )
        try:
            for key, slices in objects.items():
                await self._store(key, slices, declaring)
        finally:
            await cancel_and_wait(declaring)
        # The objects are freed: the next build may have the memory while this buffer waits for its predecessors.
        built()
        await self._register_early()
        await release_claim(self._ports, self._claim.claim_id)

    async def _store(self, key: str, slices: Sequence[BufferSlice], declaring: asyncio.Task[None]) -> None:
        """Builds and uploads an object. A function of its own, so that the object is freed after the upload:
        registration may have to wait for long."""
        target = await self._build(key, slices)
        # Not before the answer: an object without a declaration is an orphan, which a sweep may delete (decision 0007).
        await declaring
        await self._upload(target)

    async def _build(self, key: str, slices: Sequence[BufferSlice]) -> BuiltObject:
        started_ms = self._ports.clock.monotonic_ms()
        attributes: dict[str, str | int] = {"buffer_id": self._claim.buffer_id, "slices": len(slices)}
        with telemetry.tracer.start_as_current_span(
            "segmenter.build", context_of(self._claim.trace_context), attributes=attributes
        ):
            target = await self._builder.build(key, slices)
        telemetry.build_ms.record(self._ports.clock.monotonic_ms() - started_ms)
        return target

    async def _upload(self, target: BuiltObject) -> None:
        """Puts the object and offers its segments once; early segments wait in `_early`."""
        started_ms = self._ports.clock.monotonic_ms()
        attributes: dict[str, str | int] = {"object_key": target.key, "size_bytes": target.size_bytes}
        with telemetry.tracer.start_as_current_span(
            "segmenter.upload", context_of(self._claim.trace_context), attributes=attributes
        ):
            await self._ports.store.put(target.key, target.parts)
            self._traceparent = current_traceparent() or self._claim.trace_context
        telemetry.upload_ms.record(self._ports.clock.monotonic_ms() - started_ms)
        telemetry.uploaded_bytes.add(target.size_bytes)
        self._objects_left -= 1
        await self._offer(target.segments)

    async def _offer(self, segments: Sequence[types_pb2.SegmentRef]) -> None:
        """Offers segments for registration once; segments to be offered again are appended to `_early`.

        Raises ClaimLost if the answer shows that something else than the registration ended the claim.
        """
        # Before the call: a renewal may learn that the claim is over before this call is answered.
        self._unanswered = True
        try:
            early = await self._register(segments)
        except StreamHouseError as error:
            if not error.retriable:
                raise
            log.warning("buffer %s: registration to be repeated: %s", self._claim.buffer_id, error)
            self._early += segments
            return
        self._unanswered = False
        self._early += early
        if self._claim_over and self._early:
            raise ClaimLost(f"claim {self._claim.claim_id} was lost before all was registered")

    async def _register_early(self) -> None:
        """Repeats until nothing is early any more. Raises RegistrationLate."""
        backoff = Backoff(self._settings.early_retry_first_ms, self._settings.early_retry_max_ms, self._ports.rng)
        wait_until_ms = self._ports.clock.monotonic_ms() + self._settings.early_wait_ms_max
        while self._early:
            if self._ports.clock.monotonic_ms() >= wait_until_ms:
                raise RegistrationLate(f"{len(self._early)} segments still early, first: {_span(self._early[0])}")
            await self._ports.clock.sleep_ms(backoff.next_ms())
            # Taken before the call, which appends the segments that stay early.
            waiting, self._early = self._early, []
            await self._offer(waiting)

    async def _register(self, segments: Sequence[types_pb2.SegmentRef]) -> list[types_pb2.SegmentRef]:
        """Registers segments; returns those that are early. Raises UploadWithdrawn."""
        response = await self._ports.coordinator.register_segments(
            coordinator_pb2.RegisterSegmentsRequest(
                claim_id=self._claim.claim_id,
                buffer_id=self._claim.buffer_id,
                segments=segments,
                trace_context=self._traceparent,
            )
        )
        answered = list(zip(segments, response.results, strict=True))
        for segment, result in answered:
            _count(segment, result)
        # The buffer is built again under a new key: in an object whose deletion has begun nothing is ever registered.
        if withdrawn := [segment for segment, result in answered if result == WITHDRAWN]:
            raise UploadWithdrawn(f"{withdrawn[0].object_key} is being deleted: registered too late")
        return still_early(segments, response.results)

    async def _give_back(self, error: Exception) -> HandoverResult:
        why = _why(error)
        log.log(
            logging.ERROR if why in ("mismatch", "format", "refused", "defect") else logging.WARNING,
            "buffer %s of agent %s given back at attempt %d (%s): %s",
            self._claim.buffer_id,
            self._claim.agent_id,
            self._claim.attempt,
            why,
            error,
            exc_info=error if why == "defect" else None,
        )
        telemetry.failures.add(1, {"reason": why})
        # A refusal lasts until an operator acts, so the back-off of a passing failure would only fill the log.
        wait_ms = self._settings.handover_refused_retry_ms
        if why != "refused":
            wait_ms = retry_after_ms(
                self._claim.attempt,
                self._ports.rng.random(),
                first_ms=self._settings.handover_retry_first_ms,
                max_ms=self._settings.handover_retry_max_ms,
            )
        reason = f"{why}: {error}"
        await release_claim(self._ports, self._claim.claim_id, reason=reason, retry_after_ms=wait_ms)
        return HandoverResult(HandoverOutcome.FAILED, wait_ms, by_store=isinstance(error, StoreError))


def _let_go(error: BaseException) -> None:
    """Frees the objects that the frames of a failure hold.

    A task and the traceback of its error refer to each other: the object whose upload failed would stay until a full
    garbage collection, and a process that mostly waits does few.
    """
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__


def _why(error: Exception) -> str:
    """Returns the kind of a failure, for the metric and the log."""
    kinds: tuple[tuple[type[Exception], str], ...] = (
        (SliceMismatch, "mismatch"),
        (BuildTooLarge, "mismatch"),
        (FormatError, "format"),
        # Before StoreError, of which these are subclasses: the first match counts.
        *((refusal, "refused") for refusal in REFUSALS),
        (StoreError, "store"),
        (RegistrationLate, "early"),
        (UploadWithdrawn, "withdrawn"),
        (StreamHouseError, "peer"),
    )
    return next((name for kind, name in kinds if isinstance(error, kind)), "defect")


_RESULT_NAMES = {
    coordinator_pb2.REGISTRATION_RESULT_REGISTERED: "registered",
    coordinator_pb2.REGISTRATION_RESULT_COVERED: "covered",
    coordinator_pb2.REGISTRATION_RESULT_FENCED: "fenced",
    coordinator_pb2.REGISTRATION_RESULT_EARLY: "early",
    WITHDRAWN: "withdrawn",
}


def _count(segment: types_pb2.SegmentRef, result: "coordinator_pb2.RegistrationResult.ValueType") -> None:
    name = _RESULT_NAMES[result]
    telemetry.registrations.add(1, {"result": name})
    if name == "registered":
        telemetry.records.add(segment.record_count)
        telemetry.raw_bytes.add(segment.raw_bytes)
    elif name in ("covered", "fenced"):
        log.info("%s not needed: %s", _span(segment), name)


def _span(segment: types_pb2.SegmentRef) -> str:
    return f"{segment.topic}/{segment.partition} [{segment.base_offset}, {segment.end_offset})"
