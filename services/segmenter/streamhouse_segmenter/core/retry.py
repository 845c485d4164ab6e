"""Time of the next try, and meaning of the answers to a registration."""

from collections.abc import Sequence

from shproto.v1 import coordinator_pb2, types_pb2

Result = coordinator_pb2.RegistrationResult


def retry_after_ms(attempt: int, jitter: float, *, first_ms: int, max_ms: int) -> int:
    """Returns a capped exponential back-off with full jitter. `attempt` counts from 1, `jitter` lies in [0, 1)."""
    ceiling = min(max_ms, first_ms * 2 ** min(max(attempt - 1, 0), 32))
    return max(1, int(ceiling * jitter))


def still_early(
    segments: Sequence[types_pb2.SegmentRef], results: Sequence["Result.ValueType"]
) -> list[types_pb2.SegmentRef]:
    """Returns, in order, the segments to be offered again because an earlier span is not registered yet."""
    return [
        segment
        for segment, result in zip(segments, results, strict=True)
        if result == coordinator_pb2.REGISTRATION_RESULT_EARLY
    ]
