"""What a replay makes of frames does not depend on how many of them it is given at once."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shformat import HeaderColumns, WalFrame
from shproto.keys import RangeKey
from streamhouse_ingest.log.replay import Replay, frames_by_log

pytestmark = pytest.mark.quick

TOPIC = b"t" * 16
BUFFER_BYTES_MAX = 250
FILE = 3

# (epoch, step from the end of what came before, record count, batch size, producer id, producer epoch)
WRITES = st.lists(
    st.tuples(
        st.integers(1, 2),
        st.sampled_from([0, 0, 0, 0, 0, 2, -1, -7]),
        st.integers(1, 4),
        st.integers(85, 120),
        st.integers(0, 2),
        st.sampled_from([0, 0, 0, 1]),
    ),
    max_size=60,
)


def frames_of(writes: list[tuple[int, ...]]) -> tuple[list[WalFrame], HeaderColumns]:
    """The frames, and the headers of their batches."""
    frames, rows, ends, at = [], [], dict.fromkeys((1, 2), 10), 44
    for sequence, (epoch, step, count, size_bytes, producer_id, producer_epoch) in enumerate(writes):
        base_offset = max(ends[epoch] + step, 0)
        ends[epoch] = base_offset + count
        frames.append(WalFrame(TOPIC, 0, epoch, base_offset, count, at, 56 + size_bytes, at + 56, size_bytes, 0))
        rows.append((count, producer_id, producer_epoch if producer_id else 0, sequence if producer_id else 0))
        at += 56 + size_bytes
    return frames, HeaderColumns(*(list(column) for column in zip(*rows, strict=True)))


def found(replay: Replay) -> dict[str, Any]:
    """All that the agent gets to see of it."""
    return {
        "logs": {
            key: (
                log.first_offset,
                log.end_offset,
                [
                    (b.base_offset, b.end_offset, b.size_bytes, b.pick(b.base_offset, 1 << 60, 1 << 60))
                    for b in log.buffers
                ],
            )
            for key, log in replay.logs.items()
        },
        "producers": replay.producers,
        "damage": sorted(replay.damage, key=lambda damage: damage.at),
        "gaps": replay.gaps,
    }


def add_all(replay: Replay, frames: list[WalFrame], headers: HeaderColumns, together: int) -> None:
    for start in range(0, len(frames), together):
        part = slice(start, start + together)
        for key, run in frames_by_log(frames[part], HeaderColumns(*(column[part] for column in headers))):
            replay.add(key, FILE, run)


@given(WRITES.filter(bool), st.integers(2, 60), st.booleans())
def test_frames_added_together_are_as_frames_added_one_by_one(
    writes: list[tuple[int, ...]], together: int, damaged_before: bool
):
    frames, headers = frames_of(writes)
    one_by_one, many = Replay(BUFFER_BYTES_MAX), Replay(BUFFER_BYTES_MAX)
    for replay, size in ((one_by_one, 1), (many, together)):
        if damaged_before:
            replay.damaged(FILE, 0, 44, "hides frames", hides=True)
        add_all(replay, frames, headers, size)
    assert found(many) == found(one_by_one)


def test_a_buffer_is_full_with_the_batch_that_reaches_the_limit():
    frames, headers = frames_of([(1, 0, 2, 100, 0, 0)] * 7)
    replay = Replay(BUFFER_BYTES_MAX)
    add_all(replay, frames, headers, 7)
    buffers = replay.logs[RangeKey(TOPIC, 0, 1)].buffers
    assert [(len(b), b.base_offset, b.end_offset) for b in buffers] == [(3, 10, 16), (3, 16, 22), (1, 22, 24)]


def test_a_producer_is_known_by_its_last_five_batches_of_one_epoch():
    frames, headers = frames_of([*[(1, 0, 1, 100, 1, 0)] * 4, *[(1, 0, 1, 100, 1, 1)] * 30, (2, 0, 1, 100, 1, 1)])
    replay = Replay(BUFFER_BYTES_MAX)
    add_all(replay, frames, headers, 20)
    state = replay.producers[TOPIC, 0][1]
    assert (state.producer_epoch, [batch.base_sequence for batch in state.batches]) == (1, [30, 31, 32, 33, 34])
    assert [batch.base_offset for batch in state.batches] == [40, 41, 42, 43, 10], "over epochs of the partition"
