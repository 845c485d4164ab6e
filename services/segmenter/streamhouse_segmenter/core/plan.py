"""Groups slices into objects, checks pulled batches against the announced slice, reads answers to registrations."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shformat import BatchHeader
from shproto.v1 import coordinator_pb2, types_pb2

BufferSlice = coordinator_pb2.BufferSlice
Result = coordinator_pb2.RegistrationResult


class SliceMismatch(Exception):
    """The agent's batches are not the announced slice: nothing of it may be registered."""

    def __init__(self, slice_: BufferSlice, what: str, *, expected: int, got: int) -> None:
        super().__init__(f"{describe(slice_)}: {what} is {got}, expected {expected}")
        self.what = what
        self.expected = expected
        self.got = got


def describe(slice_: BufferSlice) -> str:
    """Returns topic/partition, epoch and offsets, for people."""
    span = f"[{slice_.base_offset}, {slice_.end_offset})"
    return f"{slice_.topic}/{slice_.partition} epoch {slice_.epoch} {span}"


def plan_objects(slices: Sequence[BufferSlice], bytes_target: int) -> list[list[BufferSlice]]:
    """Returns slices grouped into objects of about `bytes_target`: small slices share an object, a large slice has its
    own.

    Slices of a partition keep their order, because they register in that order.
    """
    objects: list[list[BufferSlice]] = []
    filled_bytes = 0
    for slice_ in sorted(slices, key=lambda item: (item.topic_id, item.partition, item.base_offset)):
        if not objects or filled_bytes + slice_.size_bytes > bytes_target:
            objects.append([])
            filled_bytes = 0
        objects[-1].append(slice_)
        filled_bytes += slice_.size_bytes
    return objects


@dataclass(slots=True)
class SliceProgress:
    """Compares a slice's batches with its announcement, as they arrive."""

    slice: BufferSlice
    next_offset: int
    record_count: int = 0

    @classmethod
    def of(cls, slice_: BufferSlice) -> "SliceProgress":
        """Returns the progress before the first batch."""
        return cls(slice_, slice_.base_offset)

    def take(self, headers: Iterable[BatchHeader]) -> None:
        """Counts batches in. Raises SliceMismatch for a gap, an overlap, another epoch, or records beyond the slice."""
        for header in headers:
            self._must("epoch", self.slice.epoch, header.epoch)
            self._must("base offset", self.next_offset, header.base_offset)
            # Offsets inside a range have no gaps, so a batch with fewer records than offsets is damaged or foreign.
            self._must("offsets of a batch", header.record_count, header.end_offset - header.base_offset)
            if header.end_offset > self.slice.end_offset:
                self._must("end offset", self.slice.end_offset, header.end_offset)
            self.next_offset = header.end_offset
            self.record_count += header.record_count

    def finish(self) -> None:
        """Ends the slice. Raises SliceMismatch if records are missing."""
        self._must("end offset", self.slice.end_offset, self.next_offset)
        self._must("record count", self.slice.record_count, self.record_count)

    def _must(self, what: str, expected: int, got: int) -> None:
        if expected != got:
            raise SliceMismatch(self.slice, what, expected=expected, got=got)


def still_early(
    segments: Sequence[types_pb2.SegmentRef], results: Sequence["Result.ValueType"]
) -> list[types_pb2.SegmentRef]:
    """Returns, in order, the segments to be offered again because an earlier span is not registered yet."""
    return [
        segment
        for segment, result in zip(segments, results, strict=True)
        if result == coordinator_pb2.REGISTRATION_RESULT_EARLY
    ]
