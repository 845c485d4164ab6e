"""How a job goes on, over every history of deaths: no row twice, none missing, or an error that says why."""

import contextlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shformat.limits import INT64_MAX
from shproto.errors import DataLoss, InvalidArgument, StatementLimit
from streamhouse_sql.jobs.micro_batch import (
    IDLE_MAX,
    RANGES_MAX,
    Checkpoint,
    InputPosition,
    MicroBatch,
    ReadRange,
    StateObject,
    advanced,
    check_event_time_partitions,
)
from streamhouse_sql.jobs.takeover import (
    CRASHES_MAX,
    CrashLimit,
    check_replayed,
    epoch_of,
    object_key,
    orphans,
    take_over,
)

pytestmark = pytest.mark.quick

START = {"t": InputPosition(topic="t", topic_id="ab", first_partitions=2, offsets={0: 0, 1: 0})}
PLAN = "plan-1-v2.0"


def micro_batch(number: int, start: int, rows: int, partition: int = 0) -> MicroBatch:
    return MicroBatch(
        number=number,
        ranges=(ReadRange(input="t", partition=partition, offset_from=start, offset_to=start + rows, records=rows),),
        idle=(("t", 1),),
        now_us=number,
        output_partitions=2,
        fingerprint=PLAN,
    )


class History:
    """A job whose micro-batches give a row per record, in output partition number % 2."""

    def __init__(self, sizes: list[int]) -> None:
        self.batches: list[MicroBatch] = []
        self.inputs = [START]
        self.sequences = [(0, 0)]
        for number, rows in enumerate(sizes, 1):
            batch = micro_batch(number, self.inputs[-1]["t"].offsets[0], rows)
            self.batches.append(batch)
            self.inputs.append(advanced(self.inputs[-1], batch.ranges))
            sequences = list(self.sequences[-1])
            sequences[number % 2] += rows
            self.sequences.append((sequences[0], sequences[1]))

    def checkpoint(self, number: int) -> Checkpoint:
        return Checkpoint(number=number, fingerprint=PLAN, inputs=self.inputs[number], sequences=self.sequences[number])


@st.composite
def deaths(draw: st.DrawFn) -> tuple[History, int, int, tuple[int, int]]:
    """Returns a history, the checkpoint's number, the journal's last one, and how much each partition has: no less than
    the checkpoint says, no more than the journal gives."""
    history = History(draw(st.lists(st.integers(1, 5), max_size=8)))
    journalled = draw(st.integers(0, len(history.batches)))
    stored = draw(st.integers(0, journalled))
    low, high = history.sequences[stored], history.sequences[journalled]
    written = tuple(draw(st.integers(low[at], high[at])) for at in range(2))
    return history, stored, journalled, (written[0], written[1])


@given(deaths())
def test_what_was_journalled_is_run_again_and_what_is_written_is_not(
    died: tuple[History, int, int, tuple[int, int]],
) -> None:
    history, stored, journalled, written = died
    plan = take_over(
        history.checkpoint(stored),
        history.batches[stored:journalled],
        written,
        fingerprint=PLAN,
        epoch=3,
        journal_epoch=2,
    )
    assert [batch.number for batch in plan.replay] == list(range(stored + 1, journalled + 1))
    assert plan.sequences == history.sequences[stored]
    # The rows of the replay have the numbers behind the checkpoint: those below the fence are there, the rest is sent.
    sequences = plan.sequences_in(2)
    sent: list[set[int]] = [set(), set()]
    for batch in plan.replay:
        rows = sum(item.records for item in batch.ranges)
        sent[batch.number % 2] |= set(range(sequences[batch.number % 2], sequences[batch.number % 2] + rows))
        sequences[batch.number % 2] += rows
    check_replayed(sequences, plan.written)
    for partition in range(2):
        new = {number for number in sent[partition] if number >= written[partition]}
        assert set(range(written[partition])) | new == set(range(history.sequences[journalled][partition]))


@given(deaths(), st.integers(0, 1), st.integers(1, 3))
def test_output_that_is_missing_or_not_explained_stops_the_job(
    died: tuple[History, int, int, tuple[int, int]], partition: int, count: int
) -> None:
    history, stored, journalled, written = died
    checkpoint, journal = history.checkpoint(stored), history.batches[stored:journalled]
    short = list(written)
    short[partition] = history.sequences[stored][partition] - count
    if short[partition] >= 0:
        with pytest.raises(DataLoss, match="declared lost"):
            take_over(checkpoint, journal, short, fingerprint=PLAN, epoch=3, journal_epoch=2)
    more = list(history.sequences[journalled])
    more[partition] += count
    with pytest.raises(DataLoss, match="journal gives"):
        check_replayed(history.sequences[journalled], more)


@given(deaths(), st.data())
def test_a_journal_that_does_not_follow_is_refused(
    died: tuple[History, int, int, tuple[int, int]], data: st.DataObject
) -> None:
    history, stored, journalled, written = died
    journal = history.batches[stored:journalled]
    if len(journal) < 2:
        return
    missing = data.draw(st.integers(0, len(journal) - 2))
    with pytest.raises(DataLoss, match="has no micro-batch"):
        take_over(
            history.checkpoint(stored),
            journal[:missing] + journal[missing + 1 :],
            written,
            fingerprint=PLAN,
            epoch=3,
            journal_epoch=2,
        )
    (moved,) = journal[1].ranges
    torn = replace(journal[1], ranges=(replace(moved, offset_from=moved.offset_from - 1),))
    with pytest.raises(DataLoss, match="has ended at"):
        take_over(
            history.checkpoint(stored),
            [journal[0], torn],
            written,
            fingerprint=PLAN,
            epoch=3,
            journal_epoch=2,
        )


def test_another_program_does_not_run_what_was_begun() -> None:
    history = History([1, 1])
    with pytest.raises(InvalidArgument, match="another version"):
        take_over(history.checkpoint(0), history.batches, (0, 0), fingerprint="new-1-v2.0", epoch=2, journal_epoch=1)
    # Nothing was begun: the new program goes on from the state, if it fits.
    new = "new-1-v2.1"
    assert not take_over(history.checkpoint(2), [], (1, 1), fingerprint=new, epoch=2, journal_epoch=0).replay


def test_another_compiler_does_not_go_on_with_the_state() -> None:
    state = (StateObject(table="s", key="sql/j/1-1/000.parquet", size_bytes=1, crc32=1),)
    checkpoint = replace(History([1, 1]).checkpoint(2), objects=state)
    with pytest.raises(InvalidArgument, match="version 1 of the compiler, this worker has version 2"):
        take_over(checkpoint, [], (1, 1), fingerprint="plan-2-v2.0", epoch=2, journal_epoch=0)
    # There is no state yet: any program may begin.
    take_over(replace(checkpoint, objects=()), [], (1, 1), fingerprint="plan-2-v2.0", epoch=2, journal_epoch=0)


def test_the_largest_micro_batch_fits_into_the_journal() -> None:
    wide = INT64_MAX // 2
    ranges = tuple(
        ReadRange(input="t", partition=at, offset_from=10**9, offset_to=10**9 + 1_000, records=1_000)
        for at in range(RANGES_MAX)
    )
    batch = replace(micro_batch(1, 0, 1), ranges=ranges, idle=tuple(("t", at) for at in range(IDLE_MAX)), now_us=wide)
    assert len(batch.encode()) < 256 * 1024
    assert MicroBatch.decode(1, batch.encode()) == batch
    check_event_time_partitions(IDLE_MAX)
    with pytest.raises(StatementLimit, match=f"{IDLE_MAX + 1} partitions"):
        check_event_time_partitions(IDLE_MAX + 1)
    with pytest.raises(DataLoss, match="idle partitions"):
        MicroBatch.decode(1, replace(batch, idle=(*batch.idle, ("t", IDLE_MAX))).encode())


def test_workers_that_end_in_the_same_place_again_and_again_stop_the_job() -> None:
    history = History([1])
    epoch = CRASHES_MAX + 2
    with pytest.raises(CrashLimit, match="memory"):
        take_over(history.checkpoint(0), history.batches, (0, 0), fingerprint=PLAN, epoch=epoch, journal_epoch=1)
    take_over(history.checkpoint(0), history.batches, (0, 0), fingerprint=PLAN, epoch=epoch, journal_epoch=2)
    # One of them ended with an error, or the job was resumed: crashes are counted from there.
    take_over(
        history.checkpoint(0), history.batches, (0, 0), fingerprint=PLAN, epoch=epoch, journal_epoch=1, ended_epoch=2
    )


def test_micro_batches_without_a_checkpoint_are_a_loss() -> None:
    with pytest.raises(DataLoss, match="no checkpoint"):
        take_over(None, History([1]).batches, (0, 0), fingerprint=PLAN, epoch=2, journal_epoch=1)


def test_objects_of_former_owners_are_told_from_those_that_are_needed() -> None:
    kept, old, newer = (object_key("j", epoch, 7, "000") for epoch in (1, 2, 4))
    history = History([])
    checkpoint = replace(history.checkpoint(0), objects=(StateObject(table="s", key=kept, size_bytes=1, crc32=1),))
    assert orphans([kept, old, newer, "sql/j/strange", "data/j/1-2/x"], checkpoint, 4) == [old]
    assert orphans([kept], None, 2) == [kept]
    assert epoch_of(kept) == 1 and epoch_of("sql/j/x-1/y") is None


@given(deaths())
def test_boundaries_and_pointers_are_read_back_as_they_were(
    died: tuple[History, int, int, tuple[int, int]],
) -> None:
    history, stored, _, _ = died
    for batch in history.batches:
        assert MicroBatch.decode(batch.number, batch.encode()) == batch
    checkpoint = replace(
        history.checkpoint(stored),
        objects=(StateObject(table="s_1", key="sql/j/1-1/000.parquet", size_bytes=9, crc32=5),),
        watermark_us=-5,
    )
    assert Checkpoint.decode(checkpoint.encode()) == checkpoint


@given(st.data())
def test_damaged_bytes_are_a_loss_and_nothing_else(data: st.DataObject) -> None:
    whole = micro_batch(1, 0, 3).encode()
    pointer = History([2]).checkpoint(1).encode()
    for written, read in ((whole, lambda raw: MicroBatch.decode(1, raw)), (pointer, Checkpoint.decode)):
        at = data.draw(st.integers(0, len(written) - 1))
        damaged = data.draw(
            st.sampled_from(
                [written[:at], written[:at] + b"7" + written[at + 1 :], written[:at] + b'"' + written[at + 1 :]]
            )
        )
        with contextlib.suppress(DataLoss):
            read(damaged)


@pytest.mark.parametrize(
    "entry",
    [
        b"",
        b"[]",
        b'{"version":2}',
        b'{"version":1}',
        b'{"version":1,"plan":"p","now_us":1,"output_partitions":0,"ranges":{},"idle":{}}',
        b'{"version":1,"plan":"p","now_us":1,"output_partitions":1,"ranges":{"t":[[0,5,0,1]]},"idle":{}}',
        b'{"version":1,"plan":"p","now_us":1,"output_partitions":1,"ranges":{"t":[[0,-5,3,1]]},"idle":{}}',
        b'{"version":1,"plan":"p","now_us":true,"output_partitions":1,"ranges":{},"idle":{}}',
        b"\xff",
        b"[" * 100_000,
    ],
)
def test_an_entry_that_no_worker_wrote_is_refused(entry: bytes) -> None:
    with pytest.raises(DataLoss):
        MicroBatch.decode(1, entry)
