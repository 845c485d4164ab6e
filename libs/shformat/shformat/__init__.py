"""StreamHouse's bytes: record batches, WAL frames, segments. Pure: no I/O, no clock, usable alone."""

from .batch import (
    BATCH_HEADER_SIZE,
    BatchHeader,
    Codec,
    ProducerStamp,
    check_batch,
    decode_batch,
    encode_batch,
    read_batch_header,
    split_batches,
    stamp_batch,
    validate_batch,
)
from .columns import BytesColumn, Header, HeadersColumn, Records
from .errors import FormatError
from .limits import DEFAULT_LIMITS, FormatLimits

__all__ = [
    "BATCH_HEADER_SIZE",
    "DEFAULT_LIMITS",
    "BatchHeader",
    "BytesColumn",
    "Codec",
    "FormatError",
    "FormatLimits",
    "Header",
    "HeadersColumn",
    "ProducerStamp",
    "Records",
    "check_batch",
    "decode_batch",
    "encode_batch",
    "read_batch_header",
    "split_batches",
    "stamp_batch",
    "validate_batch",
]
