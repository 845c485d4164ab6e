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
from .wal import (
    FRAME_HEADER_SIZE,
    WAL_FILE_HEADER_SIZE,
    DamagedSpan,
    WalFileHeader,
    WalFrame,
    decode_wal_file_header,
    encode_frame_header,
    encode_wal_file_header,
    scan_frames,
)

__all__ = [
    "BATCH_HEADER_SIZE",
    "DEFAULT_LIMITS",
    "FRAME_HEADER_SIZE",
    "WAL_FILE_HEADER_SIZE",
    "BatchHeader",
    "BytesColumn",
    "Codec",
    "DamagedSpan",
    "FormatError",
    "FormatLimits",
    "Header",
    "HeadersColumn",
    "ProducerStamp",
    "Records",
    "WalFileHeader",
    "WalFrame",
    "check_batch",
    "decode_batch",
    "decode_wal_file_header",
    "encode_batch",
    "encode_frame_header",
    "encode_wal_file_header",
    "read_batch_header",
    "scan_frames",
    "split_batches",
    "stamp_batch",
    "validate_batch",
]
