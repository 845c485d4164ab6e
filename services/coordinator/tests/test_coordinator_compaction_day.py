"""How often compaction writes the same bytes, and how many segments a reader meets: one partition over a day, one look
a minute, with the segmenter's default settings."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from streamhouse_coordinator.core.compaction import RUN_SEGMENTS_MAX, choose
from streamhouse_coordinator.core.tables import SegmentRow
from streamhouse_segmenter.settings import SegmenterSettings

pytestmark = pytest.mark.quick

MIB = 1024 * 1024
MINUTES = 24 * 60
SETTINGS = SegmenterSettings()
SMALL, TARGET, GROWTH = (
    SETTINGS.compaction_small_bytes_max,
    SETTINGS.compaction_target_bytes,
    SETTINGS.compaction_segments_min,
)


@dataclass
class Partition:
    """Its segments by offset; `writes`: how often the bytes of each were written, the first time included."""

    segments: list[SegmentRow] = field(default_factory=list)
    writes: dict[str, int] = field(default_factory=dict)
    next_offset: int = 0
    appended_bytes: int = 0
    merged_bytes: int = 0

    def append(self, size_bytes: int) -> None:
        self.appended_bytes += size_bytes
        self._put(len(self.segments), 0, self.next_offset, self.next_offset + 1, size_bytes, 1)
        self.next_offset += 1

    def _put(self, at: int, gone: int, base: int, end: int, size_bytes: int, writes: int) -> None:
        name = f"{base}-{end}"
        self.writes[name] = writes
        row = SegmentRow(
            segment_id=name,
            topic_id="t",
            partition=0,
            epoch=1,
            base_offset=base,
            end_offset=end,
            record_count=end - base,
            object_key="key",
            object_at=0,
            size_bytes=size_bytes,
            raw_bytes=size_bytes,
            first_timestamp_ms=0,
            max_timestamp_ms=0,
            lost_reason="",
        )
        self.segments[at : at + gone] = [row]

    def compact(self) -> None:
        """Until nothing is worth it."""
        while run := choose(self.segments, SMALL, TARGET, GROWTH):
            size_bytes = sum(item.size_bytes for item in run)
            self.merged_bytes += size_bytes
            at = self.segments.index(run[0])
            writes = 1 + max(self.writes.pop(item.segment_id) for item in run)
            self._put(at, len(run), run[0].base_offset, run[-1].end_offset, size_bytes, writes)


def day(segments_per_minute: int, bytes_per_segment: int) -> Iterator[Partition]:
    """The partition after every minute."""
    partition = Partition()
    for _ in range(MINUTES):
        for _ in range(segments_per_minute):
            partition.append(bytes_per_segment)
        partition.compact()
        yield partition


@pytest.mark.parametrize("kib_per_second", [1, 10, 100])
@pytest.mark.parametrize(("acks", "segments_per_minute"), [("wal", 6), ("durable", 60)])
def test_a_day_of_steady_appends(acks: str, segments_per_minute: int, kib_per_second: int) -> None:
    """With `durable` each second's records are a segment, else every ten seconds'."""
    first_bytes = kib_per_second * 1024 * 60 // segments_per_minute
    most = 0
    for partition in day(segments_per_minute, first_bytes):
        # A reader opens the full segments, which no rule could spare it, and some small ones.
        most = max(most, len(partition.segments) - partition.appended_bytes // SMALL)
    writes = max(partition.writes.values())
    amplification = partition.merged_bytes / partition.appended_bytes
    print(
        f"{acks} {kib_per_second} KiB/s: {amplification:.1f} merged bytes per byte, {len(partition.segments)} segments"
    )
    assert writes <= 2 + math.log(TARGET / first_bytes, GROWTH), "about log(n) times, the first time included"
    assert amplification <= 4
    assert most <= RUN_SEGMENTS_MAX


@pytest.mark.long
def test_a_day_of_durable_acks_of_single_records() -> None:
    """Four segments a second of 300 bytes, mostly frame: 345,600 a day in one partition."""
    for partition in day(240, 300):
        assert len(partition.segments) <= RUN_SEGMENTS_MAX
    assert partition.merged_bytes / partition.appended_bytes <= 4
