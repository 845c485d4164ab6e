"""Checks an agent's tail: only batches that pass their CRC and follow on from the requested offset are served."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shformat import FormatError, check_batch, read_batch_header


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    batches: list[bytes]
    size_bytes: int
    decoded_bytes: int
    next_offset: int


def is_of_later_epoch(batches: Sequence[bytes], epoch: int) -> bool:
    """Returns True if the agent has begun another epoch at this offset: the answer is good, the plan is old."""
    try:
        return bool(batches) and read_batch_header(batches[0]).epoch > epoch
    except FormatError:
        return False  # accept_batches() names the fault


def accept_batches(
    batches: Iterable[bytes],
    offset: int,
    epoch: int,
    end_offset: int | None,
    *,
    bytes_max: int | None = None,
    decoded_bytes_max: int | None = None,
) -> Accepted | str:
    """Returns the batches for a reader at `offset`, or the fault in them.

    Nothing beyond `end_offset` is accepted: such batches were written, but their range was settled below them. After
    the first batch, batches beyond `bytes_max`, or `decoded_bytes_max` decoded, are left for the next read: an answer
    may be to a poll that serves other readers with more room as well.
    """
    accepted: list[bytes] = []
    next_offset, size_bytes, decoded_bytes = offset, 0, 0
    for batch in batches:
        try:
            header = check_batch(batch)
        except FormatError as error:
            return str(error)
        if end_offset is not None and header.end_offset > end_offset:
            break
        # The first batch may begin before the offset: batches are served whole, and the reader skips what it has.
        follows = header.base_offset == next_offset or (not accepted and header.base_offset < next_offset)
        if header.epoch != epoch or not follows or header.end_offset <= next_offset:
            found = f"{header.base_offset} to {header.end_offset} of epoch {header.epoch}"
            return f"offset {next_offset} of epoch {epoch} asked for, {found} sent"
        if accepted and bytes_max is not None and size_bytes + len(batch) > bytes_max:
            break
        if accepted and decoded_bytes_max is not None and decoded_bytes + header.decoded_bytes > decoded_bytes_max:
            break
        accepted.append(batch)
        size_bytes += len(batch)
        decoded_bytes += header.decoded_bytes
        next_offset = header.end_offset
    return Accepted(batches=accepted, size_bytes=size_bytes, decoded_bytes=decoded_bytes, next_offset=next_offset)
