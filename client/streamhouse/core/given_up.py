"""What the futures of a batch that is given up fail with."""

from typing import Any

from shproto.errors import OutcomeUnknown, StreamHouseError, Unavailable

from streamhouse.core.sequences import Outgoing, in_doubt


def refused(topic: str, partition: int, outgoing: Outgoing[Any], error: StreamHouseError) -> StreamHouseError:
    """For a batch that is not sent again after `error`: that error, unless an earlier try may have been written."""
    if not in_doubt(outgoing, error):
        return error
    return OutcomeUnknown(
        f"{topic}/{partition}: {outgoing.record_count} records may or may not have been written. An "
        "earlier try got no answer, and the leader that was asked again does not have this producer's history: another "
        "agent took over, or the metadata was restored. Sent once more they could be there twice, so they are given "
        f"up. Read the partition once it is settled (the leader's answer was {error.reason}: {error.message})",
        topic=topic,
        partition=partition,
        record_count=outgoing.record_count,
        refusal=error.reason,
    )


def timed_out(delivery_timeout_ms: int, last_error: StreamHouseError | None) -> StreamHouseError:
    """For a batch past its deadline: of the kind of the last error, so that the cause is told."""
    waited = f"not acknowledged within delivery_timeout_ms = {delivery_timeout_ms}"
    if last_error is None:
        return Unavailable(f"{waited}; no answer from the leader", limit="delivery_timeout_ms")
    error = type(last_error)(f"{waited}; last error: {last_error.message}")
    error.details = dict(last_error.details)
    return error
