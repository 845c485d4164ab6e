"""Compares what came back with what was sent: every record once, in order, byte for byte, on its key's partition."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from shformat.murmur2 import partition_of
from streamhouse.records import RecordBatch


class Mismatch(Exception):
    """Names the record that is not what it has to be."""


@dataclass(frozen=True, slots=True)
class Sent:
    """Records in the order sent, and where each was acknowledged: arrays of shape (n,)."""

    values: Sequence[bytes]
    keys: Sequence[bytes | None]
    partitions: NDArray[np.int64]
    offsets: NDArray[np.int64]


class Expectation:
    """What each partition has to give, in order. `take` compares batch by batch, `finish` finds what is missing."""

    def __init__(self, sent: Sent, partition_count: int) -> None:
        """Raises Mismatch where acknowledgements alone are wrong already."""
        self._sent = sent
        _check_partitions(sent, partition_count)
        self._records = [np.flatnonzero(sent.partitions == number) for number in range(partition_count)]
        self._taken = [0] * partition_count
        for number, records in enumerate(self._records):
            _check_order(number, sent.offsets[records], records)

    @property
    def taken(self) -> int:
        """Records compared so far."""
        return sum(self._taken)

    def take(self, batch: RecordBatch) -> None:
        """Raises Mismatch unless these are the next records of their partition."""
        start = self._taken[batch.partition]
        records = self._records[batch.partition][start : start + len(batch)]
        where = f"partition {batch.partition}"
        if len(records) < len(batch):
            extra = batch.offsets[len(records)]
            raise Mismatch(f"{where}, offset {extra}: a record too many; {start + len(records)} were sent there")
        offsets = self._sent.offsets[records]
        if not np.array_equal(offsets, batch.offsets):
            at = int(np.argmax(offsets != batch.offsets))
            raise Mismatch(
                f"{where}: offset {batch.offsets[at]} came where {offsets[at]} was due, record {records[at]} as sent"
            )
        self._compare("value", self._sent.values, batch.values.to_list(), records, batch)
        self._compare("key", self._sent.keys, batch.keys.to_list(), records, batch)
        self._taken[batch.partition] += len(batch)

    def _compare(
        self,
        what: str,
        sent: Sequence[bytes | None],
        read: list[bytes | None],
        records: NDArray[np.int64],
        batch: RecordBatch,
    ) -> None:
        expected = [sent[record] for record in records.tolist()]
        if expected == read:
            return
        at = next(at for at, (left, right) in enumerate(zip(expected, read, strict=True)) if left != right)
        raise Mismatch(
            f"partition {batch.partition}, offset {batch.offsets[at]}, record {records[at]} as sent: "
            f"{what} is {read[at]!r}, sent was {expected[at]!r}"
        )

    def finish(self) -> None:
        """Raises Mismatch naming the first record that did not come."""
        for number, (records, taken) in enumerate(zip(self._records, self._taken, strict=True)):
            if taken < len(records):
                offset = self._sent.offsets[records[taken]]
                raise Mismatch(
                    f"partition {number}: record {records[taken]} as sent, offset {offset}, did not come back"
                )


def _check_partitions(sent: Sent, partition_count: int) -> None:
    target = {key: partition_of(key, partition_count) for key in set(sent.keys) if key is not None}
    for record, (key, partition) in enumerate(zip(sent.keys, sent.partitions.tolist(), strict=True)):
        if key is not None and target[key] != partition:
            raise Mismatch(f"record {record} as sent: key {key!r} is on partition {partition}, not {target[key]}")
        if not 0 <= partition < partition_count:
            raise Mismatch(f"record {record} as sent: partition {partition} does not exist")


def _check_order(number: int, offsets: NDArray[np.int64], records: NDArray[np.int64]) -> None:
    steps = np.diff(offsets)
    if len(steps) and steps.min() <= 0:
        at = int(np.argmax(steps <= 0)) + 1
        raise Mismatch(
            f"partition {number}: record {records[at]} as sent got offset {offsets[at]}, not after the one before"
        )
