"""Many batch headers checked at once, for the replay of a write-ahead log.

The rules are those of read_batch_header(), applied to columns. A header that fails is read again by
read_batch_header(), which names the reason. Both together cost a seventh of reading the headers separately.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .batch_header import (
    BATCH_HEADER_SIZE,
    BATCH_MAGIC,
    BATCH_VERSION,
    FLAGS_ALL,
    Buffer,
    Flag,
    read_batch_header,
)
from .compression import COMPRESSION_RATIO_MAX, Codec
from .limits import DEFAULT_LIMITS, INT64_MAX, FormatLimits
from .payload import PAYLOAD_BYTES_MIN

_HEADER = np.dtype(
    [
        ("base_offset", "<i8"),
        ("epoch", "<u8"),
        ("crc", "<u4"),
        ("magic", "S4"),
        ("version", "u1"),
        ("codec", "u1"),
        ("flags", "<u2"),
        ("size_bytes", "<u4"),
        ("uncompressed_bytes", "<u4"),
        ("record_count", "<u4"),
        ("last_offset_delta", "<i8"),
        ("first_timestamp_ms", "<i8"),
        ("max_timestamp_ms", "<i8"),
        ("producer_id", "<i8"),
        ("base_sequence", "<i8"),
        ("producer_epoch", "<u4"),
    ]
)
assert _HEADER.itemsize == BATCH_HEADER_SIZE

_Columns = NDArray[np.void]
_Sound = NDArray[np.bool_]


class HeaderColumns(NamedTuple):
    """Fields of consecutive batch headers, an array per field; producer_ids has 0 for batches without a producer."""

    record_counts: list[int]
    producer_ids: list[int]
    producer_epochs: list[int]
    base_sequences: list[int]


def read_batch_headers(buffer: Buffer, ats: Sequence[int], limits: FormatLimits = DEFAULT_LIMITS) -> HeaderColumns:
    """Returns the headers at the byte positions `ats`, all of which must lie in `buffer`.

    Raises the FormatError of read_batch_header() for the first bad header.
    """
    headers = np.frombuffer(b"".join([buffer[at : at + BATCH_HEADER_SIZE] for at in ats]), _HEADER)
    sound = _sound_kinds(headers) & _sound_sizes(headers, limits) & _sound_places(headers)
    if not sound.all():
        read_batch_header(buffer, ats[int(sound.argmin())], limits)
        raise AssertionError("one header and many are not read by the same rules")
    names = ("record_count", "producer_id", "producer_epoch", "base_sequence")
    return HeaderColumns(*(headers[name].tolist() for name in names))


def _sound_kinds(headers: _Columns) -> _Sound:
    kinds = (headers["magic"] == BATCH_MAGIC) & (headers["version"] == BATCH_VERSION)
    codecs = headers["codec"]
    # The values of Codec have no gap; a test holds that.
    known: _Sound = (
        kinds & (codecs >= min(Codec)) & (codecs <= max(Codec)) & (headers["flags"] & (0xFFFF ^ FLAGS_ALL) == 0)
    )
    return known


def _sound_sizes(headers: _Columns, limits: FormatLimits) -> _Sound:
    sizes, uncompressed, counts = (  # u32 in int64: nothing below can overflow
        headers[name].astype(np.int64) for name in ("size_bytes", "uncompressed_bytes", "record_count")
    )
    stored = sizes - BATCH_HEADER_SIZE
    sound: _Sound = (
        (stored > 0)
        & (sizes <= limits.batch_bytes_max)
        & (uncompressed <= limits.uncompressed_bytes_max)
        & ((headers["codec"] != Codec.NONE) | (uncompressed == stored))
        & (uncompressed <= stored * COMPRESSION_RATIO_MAX)
        & (counts >= 1)
        & (counts <= limits.record_count_max)
        & (PAYLOAD_BYTES_MIN + 2 * counts - 1 <= uncompressed)
    )
    return sound


def _sound_places(headers: _Columns) -> _Sound:
    deltas, counts, offsets = (
        headers["last_offset_delta"],
        headers["record_count"].astype(np.int64),
        headers["base_offset"],
    )
    gapped = headers["flags"] & Flag.OFFSET_GAPS != 0
    producers, sequences = headers["producer_id"], headers["base_sequence"]
    unstamped = (producers == 0) & (sequences == 0) & (headers["producer_epoch"] == 0)
    sound: _Sound = (
        np.where(gapped, deltas >= counts, deltas == counts - 1)
        & (offsets >= 0)
        & (offsets <= INT64_MAX - 1 - deltas)  # deltas that are sound are not negative
        & (headers["epoch"] <= INT64_MAX)
        & (headers["first_timestamp_ms"] <= headers["max_timestamp_ms"])
        & (((producers > 0) & (sequences >= 0)) | unstamped)
    )
    return sound
