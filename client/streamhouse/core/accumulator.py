"""Records of one partition wait here for company until they travel as one batch.

Owns: when a batch is full, what it holds. Does not own: time, sequence numbers, the network.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Generic, TypeVar

from shformat import DEFAULT_LIMITS, Codec, Header, ProducerStamp, encode_lists

T = TypeVar("T")

# What a record costs in a batch besides its bytes (lengths, timestamp: at most 30), and in memory meanwhile (list
# entries); so that a batch of empty records ends too: 32,768 of them in 1 MiB.
RECORD_OVERHEAD_BYTES = 32
# A record alone may fill a batch: what the format allows, minus its header, tables and this record's columns.
RECORD_BYTES_MAX = DEFAULT_LIMITS.batch_bytes_max - 64 * 1024


@dataclass(slots=True, eq=False)
class Gathering(Generic[T]):
    """A batch in the making. `delivery` is the owner's handle of its outcome; the batch fails at `deadline_ms`."""

    delivery: T
    deadline_ms: float
    values: list[bytes | None] = field(default_factory=list)
    timestamps_ms: list[int] = field(default_factory=list)
    # None while no record has one.
    keys: list[bytes | None] | None = None
    headers: list[tuple[Header, ...]] | None = None
    size_bytes: int = 0

    def add(
        self, value: bytes | None, key: bytes | None, headers: tuple[Header, ...], timestamp_ms: int, size: int
    ) -> int:
        """Appends one record. Returns its position in the batch."""
        index = len(self.values)
        self.values.append(value)
        self.timestamps_ms.append(timestamp_ms)
        if self.keys is not None:
            self.keys.append(key)
        elif key is not None:
            self.keys = [None] * index
            self.keys.append(key)
        if self.headers is not None:
            self.headers.append(headers)
        elif headers:
            self.headers = [()] * index
            self.headers.append(headers)
        self.size_bytes += size
        return index

    def extend(
        self,
        values: Sequence[bytes | None],
        keys: Sequence[bytes | None] | None,
        headers: Sequence[tuple[Header, ...]] | None,
        timestamps_ms: Sequence[int],
        size: int,
    ) -> int:
        """Appends many records. Returns the position of the first."""
        index = len(self.values)
        if keys is not None:
            if self.keys is None:
                self.keys = [None] * index
            self.keys.extend(keys)
        elif self.keys is not None:
            self.keys.extend(repeat(None, len(values)))
        if headers is not None:
            if self.headers is None:
                self.headers = [()] * index
            self.headers.extend(headers)
        elif self.headers is not None:
            self.headers.extend(repeat((), len(values)))
        self.values.extend(values)
        self.timestamps_ms.extend(timestamps_ms)
        self.size_bytes += size
        return index

    def encode(self, codec: Codec, producer: ProducerStamp | None) -> bytes:
        """Returns all of it as one record batch. Raises FormatError."""
        return encode_lists(self.values, self.keys, self.timestamps_ms, self.headers, codec=codec, producer=producer)
