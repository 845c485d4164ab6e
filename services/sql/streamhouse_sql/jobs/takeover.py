"""Decides how a worker goes on with a job: which state to restore, which micro-batches to run again, which output is
there. Pure.

The next owner has three witnesses: the checkpoint, the journal of the micro-batches behind it, and the fences, which
say how much of the output each partition has. Output that is there is not written again; output that is missing and
cannot be made again is a loss, and the job stops.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from shproto.errors import DataLoss, InvalidArgument

from streamhouse_sql.jobs.micro_batch import Checkpoint, MicroBatch, StateObject, advanced

# Workers in a row that ended within the same micro-batches, without a word and without a checkpoint: the next one
# would end, too. Far more than a machine that restarts now and then ends.
CRASHES_MAX = 20


class CrashLimit(InvalidArgument):
    """Workers died in the same micro-batches again and again; a job that is resumed is tried anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Takeover:
    """Plan of a takeover. `restore`: objects with the state. `replay`: micro-batches to run with the boundaries that
    they have. `sequences`: of the first record per output partition that these give. `written`: sequences that the
    output has already; it may not have more behind the replay."""

    restore: tuple[StateObject, ...]
    replay: tuple[MicroBatch, ...]
    sequences: tuple[int, ...]
    written: tuple[int, ...]

    def sequences_in(self, partitions: int) -> list[int]:
        """Returns the sequences of the first records, for a topic with at least as many partitions."""
        return [*self.sequences, *([0] * (partitions - len(self.sequences)))]


def take_over(
    checkpoint: Checkpoint | None,
    journal: Sequence[MicroBatch],
    written: Sequence[int],
    *,
    fingerprint: str,
    epoch: int,
    journal_epoch: int,
    ended_epoch: int = 0,
) -> Takeover:
    """Returns how to go on. `written`: next sequence per output partition, by the fences. `journal_epoch`: of the
    newest entry, 0 without. `ended_epoch`: newest that did not crash, since it ended with an error or was paused.

    Raises DataLoss if the journal has a gap, if micro-batches do not follow the checkpoint, or if the output ends
    before the checkpoint; InvalidArgument if the journal is of another program, or the state of another compiler;
    CrashLimit if workers end in the journal again and again.
    """
    number = checkpoint.number if checkpoint is not None else 0
    replay = [batch for batch in journal if batch.number > number]
    for at, batch in enumerate(replay, number + 1):
        if batch.number != at:
            raise DataLoss(f"the journal has no micro-batch {at}, its next one is {batch.number}")
    if checkpoint is None and replay:
        raise DataLoss("the journal has micro-batches, and there is no checkpoint that they follow")
    _check_program(replay, fingerprint)
    if checkpoint is not None:
        _check_state(checkpoint, fingerprint)
        _check_order(checkpoint, replay)
    crashes = epoch - max(journal_epoch, ended_epoch)
    if replay and crashes > CRASHES_MAX:
        raise CrashLimit(
            f"{CRASHES_MAX} workers in a row ended in micro-batches {replay[0].number} to {replay[-1].number} without "
            "an error of their own, as when memory is short, of this job or of another one in the process",
            field="epoch",
            value=crashes,
            limit=CRASHES_MAX,
        )
    sequences = checkpoint.sequences if checkpoint is not None else ()
    for partition, (expected, found) in enumerate(zip(sequences, written, strict=False)):
        if found < expected:
            raise DataLoss(
                f"output partition {partition} ends before record {found} of the job; the checkpoint covers "
                f"{expected}: output was declared lost",
                partition=partition,
                expected=expected,
                found=found,
            )
    return Takeover(
        restore=checkpoint.objects if checkpoint is not None else (),
        replay=tuple(replay),
        sequences=tuple(sequences),
        written=tuple(written),
    )


def check_replayed(sequences: Sequence[int], written: Sequence[int]) -> None:
    """Checks that the replay gave all output that is there. Raises DataLoss: other rows than these are written."""
    for partition, (reached, found) in enumerate(zip(sequences, written, strict=False)):
        if found > reached:
            raise DataLoss(
                f"output partition {partition} has {found} records of the job, and its journal gives {reached}",
                partition=partition,
                expected=reached,
                found=found,
            )


def orphans(keys: Iterable[str], checkpoint: Checkpoint | None, epoch: int) -> list[str]:
    """Returns the objects among `keys` that no checkpoint needs: of an older epoch, and not of the last checkpoint.
    Names that no worker gives are left alone."""
    needed = {item.key for item in checkpoint.objects} if checkpoint is not None else set()
    return [key for key in keys if key not in needed and (found := epoch_of(key)) is not None and found < epoch]


def object_key(job_id: str, epoch: int, number: int, table: str) -> str:
    """Returns the key of an object of a checkpoint. No two owners of a job give the same one."""
    return f"{prefix_of(job_id)}{epoch:010d}-{number:019d}/{table}.parquet"


def prefix_of(job_id: str) -> str:
    """Returns the beginning of the keys of a job's objects."""
    return f"sql/{job_id}/"


def compiler_of(fingerprint: str) -> str:
    """Returns the version of the compiler in the fingerprint of a plan: program-compiler-DuckDB."""
    return fingerprint.partition("-")[2].partition("-")[0]


def epoch_of(key: str) -> int | None:
    """Returns the epoch in the name of an object, None for a name that is none of ours."""
    parts = key.split("/")
    epoch = parts[2].partition("-")[0] if len(parts) == 4 and parts[0] == "sql" else ""
    return int(epoch) if epoch.isdecimal() else None


def _check_state(checkpoint: Checkpoint, fingerprint: str) -> None:
    """Checks that this worker's compiler has made the tables of the state: those of another mean other things."""
    if checkpoint.objects and compiler_of(checkpoint.fingerprint) != compiler_of(fingerprint):
        raise InvalidArgument(
            f"the state was stored by version {compiler_of(checkpoint.fingerprint)} of the compiler, this worker has "
            f"version {compiler_of(fingerprint)}: run a worker of that version, or drop the job and create it again",
            field="fingerprint",
            value=checkpoint.fingerprint,
            limit=fingerprint,
        )


def _check_program(replay: Collection[MicroBatch], fingerprint: str) -> None:
    for batch in replay:
        if batch.fingerprint != fingerprint:
            raise InvalidArgument(
                f"micro-batch {batch.number} was begun by another version of the program, whose rows could be others: "
                "run a worker of that version until it has stored a checkpoint, as one that is stopped does",
                field="fingerprint",
                value=batch.fingerprint,
                limit=fingerprint,
            )


def _check_order(checkpoint: Checkpoint, replay: Iterable[MicroBatch]) -> None:
    """Checks that every range begins where the one before has ended."""
    inputs = checkpoint.inputs
    for batch in replay:
        for item in batch.ranges:
            if item.input not in inputs:
                raise DataLoss(f"micro-batch {batch.number} reads {item.input!r}, which the checkpoint does not know")
            at = inputs[item.input].offsets.get(item.partition)
            if at is not None and at != item.offset_from:
                raise DataLoss(
                    f"micro-batch {batch.number} begins at offset {item.offset_from} of {item.input}/{item.partition}, "
                    f"the one before has ended at {at}"
                )
        inputs = advanced(inputs, batch.ranges)
