"""Upper bounds on the memory that a reader allocates. Checked before any allocation, and again before writing."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20

INT64_MAX = (1 << 63) - 1
INT64_MIN = -(1 << 63)
UINT32_MAX = (1 << 32) - 1

TIMESTAMP_MS_MIN = -62_135_596_800_000
TIMESTAMP_MS_MAX = 253_402_300_799_999
"""0001-01-01 to 9999-12-31T23:59:59.999 UTC: what ISO 8601, Python, SQL and Arrow have a date for. Asked of new batches
only: those written before there was a limit are read whatever they say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatLimits:
    """Upper bounds on declared sizes and counts; a declared number above its bound is a FormatError.

    The sizes are u32 fields on disk, so no bound may exceed 2**32 - 1.
    """

    # A batch travels in a gRPC message and is held whole: 16 blocks of 1 MiB is generous for either.
    batch_bytes_max: int = 16 * MIB
    # 4x the encoded bound: text rarely shrinks further, and a decode stays far below 1 GiB of memory.
    uncompressed_bytes_max: int = 64 * MIB
    # Decoding costs about 80 bytes per record of temporary columns: 80 MB at this bound.
    record_count_max: int = 1_000_000
    # Tracing, schema ids and routing use a handful; hundreds are a mistake by the producer.
    headers_per_record_max: int = 256
    # Headers over all records of a batch, for the same 80 bytes each.
    header_count_max: int = 2_000_000
    # Four times the largest buffer that is sealed (256 MiB), which leaves room for compaction.
    segment_bytes_max: int = 1024 * MIB
    # 64 bytes each: an index of 16 MiB, which a segment of 1 GiB reaches at 4 KiB per block.
    index_entries_max: int = 262_144

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not 1 <= value <= UINT32_MAX:
                raise ValueError(f"{name} is {value}, must be 1 to {UINT32_MAX}")


DEFAULT_LIMITS = FormatLimits()
