"""Loads that clients put on a log, the same for each system that is measured: see `System`.

Each load is one process of its own (`python -m bench.loads`), so that its CPU time is its own and two of them do not
share an interpreter's lock.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

BATCH_BYTES = 100_000
"""Size of the records that an application hands over at once."""

IN_FLIGHT = 16
"""Batches that wait for their acknowledgement at the same time."""

WARM_UP_S = 1.0
"""Start of a paced stream that is sent and read, and not measured: connections, first fetches, JIT compilers."""

STAMP_BYTES = 8
"""At the start of a paced record: when it was due, in ns of the machine's monotonic clock."""


@dataclass(frozen=True, slots=True)
class Sent:
    """Acknowledged records, and the seconds from the first send to the last acknowledgement."""

    records: int
    seconds: float


class System(Protocol):
    """A log under load, through the client that its users have. Each call opens its own connections."""

    def create_topic(self, topic: str, partitions: int) -> None: ...

    def batches(self, topic: str, values: Sequence[bytes], seconds: float, producers: int) -> Sent:
        """Sends batches of BATCH_BYTES, IN_FLIGHT at a time, from that many producers."""

    def one_by_one(self, topic: str, values: Sequence[bytes], seconds: float) -> Sent:
        """Sends single records without waiting for each other's acknowledgement."""

    def unpipelined(self, topic: str, values: Sequence[bytes], seconds: float) -> Sent:
        """Sends single records, each after the acknowledgement of the one before."""

    def pace(self, topic: str, paced: "Paced") -> Sent:
        """Sends the records that are due, each millisecond."""

    def listen(self, topic: str, count: int, began: Callable[[], None]) -> list[float]:
        """Reads `count` paced records from the end of the topic on, after calling `began`. Returns their delays in
        ms."""


@dataclass(frozen=True, slots=True)
class Paced:
    """A steady stream of records."""

    records_per_s: int
    seconds: float
    record_bytes: int

    @property
    def records(self) -> int:
        """Number of records of the stream, those of the warm-up included."""
        return self.warm_up_records + int(self.records_per_s * self.seconds)

    @property
    def warm_up_records(self) -> int:
        return int(self.records_per_s * WARM_UP_S)

    def due(self, elapsed_s: float) -> int:
        """Returns how many records are due after that many seconds."""
        return min(int(elapsed_s * self.records_per_s), self.records)

    def values(self, began_ns: int, first: int, last: int) -> list[bytes]:
        """Returns the records numbered from `first` to before `last`, each stamped with the time that it is due."""
        filler = bytes(self.record_bytes - STAMP_BYTES)
        step_ns = 1_000_000_000 / self.records_per_s
        dues = (began_ns + int(number * step_ns) for number in range(first, last))
        return [due.to_bytes(STAMP_BYTES, "little") + filler for due in dues]


def delays_ms(values: Sequence[bytes | None], now_ns: int) -> list[float]:
    """Returns how long ago each paced record was due, in ms."""
    stamps = np.frombuffer(b"".join(value[:STAMP_BYTES] for value in values if value is not None), "<i8")
    delays: list[float] = ((now_ns - stamps) / 1e6).tolist()
    return delays
