"""StreamHouse's bytes: record batches, WAL frames, segments. Pure: no I/O, no clock, usable alone."""

from .batch import check_batch, decode_batch, encode_batch, split_batches, stamp_batch, validate_batch
from .batch_header import BATCH_HEADER_SIZE, BatchHeader, Codec, ProducerStamp, read_batch_header
from .batch_headers import HeaderColumns, read_batch_headers
from .batches import decode_batches
from .columns import BytesColumn, Header, HeadersColumn, Records
from .errors import FormatError
from .inspect import describe_segment, describe_wal_file
from .limits import DEFAULT_LIMITS, FormatLimits
from .segment import (
    SEGMENT_FOOTER_SIZE,
    SEGMENT_HEADER_SIZE,
    SEGMENT_MAGIC,
    SegmentFooter,
    SegmentHeader,
    SegmentInfo,
    decode_footer,
    decode_index,
    decode_segment_header,
)
from .segment_builder import BLOCK_BYTES_TARGET, BuiltSegment, SegmentBuilder
from .segment_index import BlockEntry, SegmentIndex
from .segment_reader import (
    ReadAt,
    check_block,
    last_segment_size,
    open_segment,
    read_block,
    run_plan,
    run_plan_async,
)
from .wal import (
    FRAME_HEADER_SIZE,
    WAL_FILE_HEADER_SIZE,
    WAL_FILE_HEADER_SIZE_V1,
    DamagedSpan,
    WalFileHeader,
    WalFrame,
    decode_wal_file_header,
    encode_frame_header,
    encode_wal_file_header,
    frames_start,
    scan_frames,
)

__all__ = [
    "BATCH_HEADER_SIZE",
    "BLOCK_BYTES_TARGET",
    "DEFAULT_LIMITS",
    "FRAME_HEADER_SIZE",
    "SEGMENT_FOOTER_SIZE",
    "SEGMENT_HEADER_SIZE",
    "SEGMENT_MAGIC",
    "WAL_FILE_HEADER_SIZE",
    "WAL_FILE_HEADER_SIZE_V1",
    "BatchHeader",
    "BlockEntry",
    "BuiltSegment",
    "BytesColumn",
    "Codec",
    "DamagedSpan",
    "FormatError",
    "FormatLimits",
    "Header",
    "HeaderColumns",
    "HeadersColumn",
    "ProducerStamp",
    "ReadAt",
    "Records",
    "SegmentBuilder",
    "SegmentFooter",
    "SegmentHeader",
    "SegmentIndex",
    "SegmentInfo",
    "WalFileHeader",
    "WalFrame",
    "check_batch",
    "check_block",
    "decode_batch",
    "decode_batches",
    "decode_footer",
    "decode_index",
    "decode_segment_header",
    "decode_wal_file_header",
    "describe_segment",
    "describe_wal_file",
    "encode_batch",
    "encode_frame_header",
    "encode_wal_file_header",
    "frames_start",
    "last_segment_size",
    "open_segment",
    "read_batch_header",
    "read_batch_headers",
    "read_block",
    "run_plan",
    "run_plan_async",
    "scan_frames",
    "split_batches",
    "stamp_batch",
    "validate_batch",
]
