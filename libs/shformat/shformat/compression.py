"""Payloads of record batches compressed and decompressed, a section per codec.

docs/formats/record-batch.md has the rules. All codecs work without the interpreter's lock, so a thread that compresses
or decompresses does not hold up the others.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Sequence
from enum import IntEnum
from types import ModuleType
from typing import TYPE_CHECKING

import lz4.block

from .errors import FormatError, MissingExtra
from .limits import MIB

if TYPE_CHECKING:
    import zstandard

# A stored byte stands for at most this many bytes of the payload; a higher ratio would let a few bytes make a reader
# allocate much. LZ4 cannot exceed it. Writers store a payload that zstd (beyond 10,000) or gzip (1,032) would shrink
# further as LZ4.
COMPRESSION_RATIO_MAX = 255

# Kafka's defaults for both: higher levels cost a producer more CPU, several times over, than they save.
ZSTD_LEVEL = 3
GZIP_LEVEL = 6

# Limit on the window that a zstd frame asks a decoder to keep; frames of levels up to 19 ask for 8 MiB at most.
ZSTD_WINDOW_BYTES_MAX = 64 * MIB

# zlib's wbits: the largest window, and the header and trailer of gzip around it.
_GZIP_WBITS = 16 + zlib.MAX_WBITS


class Codec(IntEnum):
    """Compression of a payload. Persisted, never reuse; 0 is invalid."""

    NONE = 1
    LZ4 = 2
    ZSTD = 3
    GZIP = 4


class _Zstd(threading.local):
    """Contexts of a thread: threads must not share them, and making them costs more than a small batch.

    A thread makes its own when it first uses zstd. Only then is the package imported: without the extra `zstd` it is
    not there, and every other codec works."""

    _compressor: zstandard.ZstdCompressor | None = None
    _decompressor: zstandard.ZstdDecompressor | None = None

    @property
    def compressor(self) -> zstandard.ZstdCompressor:
        """The thread's compressor. Raises MissingExtra."""
        if self._compressor is None:
            self._compressor = _zstandard().ZstdCompressor(level=ZSTD_LEVEL)
        return self._compressor

    @property
    def decompressor(self) -> zstandard.ZstdDecompressor:
        """The thread's decompressor. Raises MissingExtra."""
        if self._decompressor is None:
            self._decompressor = _zstandard().ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES_MAX)
        return self._decompressor


_zstd = _Zstd()


def _zstandard() -> ModuleType:
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise MissingExtra("zstd compression", "zstandard", "zstd") from error
    return zstandard


def require_codec(codec: Codec) -> None:
    """Checks that a codec can be used: raises MissingExtra if its package is not installed."""
    if codec is Codec.ZSTD:
        _zstandard()


def compress(parts: Sequence[bytes | memoryview], codec: Codec) -> tuple[Codec, Sequence[bytes | memoryview]]:
    """Compresses the payload; returns the codec used, and the stored parts.

    LZ4 replaces a `codec` whose result would exceed COMPRESSION_RATIO_MAX; NONE, with the parts unchanged, replaces a
    codec that does not shrink the payload.
    """
    if codec is Codec.NONE:
        return codec, parts
    payload = b"".join(parts)
    stored = _COMPRESS[codec](payload)
    if len(payload) > len(stored) * COMPRESSION_RATIO_MAX:
        codec, stored = Codec.LZ4, _COMPRESS[Codec.LZ4](payload)
    # A payload that does not shrink would cost each reader a decompression for nothing.
    if len(stored) < len(payload):
        return codec, [stored]
    return Codec.NONE, parts


def decompress(stored: memoryview, codec: Codec, uncompressed_bytes: int) -> memoryview:
    """Returns the payload, which has exactly `uncompressed_bytes`, a size that the caller has checked.

    Allocates at most twice that size and a copy of `stored`, for any content of `stored`. Raises FormatError, without a
    position.
    """
    if codec is Codec.NONE:
        return stored
    payload = _DECOMPRESS[codec](stored, uncompressed_bytes)
    if len(payload) != uncompressed_bytes:
        raise FormatError(f"{_NAMES[codec]} payload holds {len(payload)} bytes, {uncompressed_bytes} declared")
    return memoryview(payload)


_NAMES = {Codec.LZ4: "LZ4", Codec.ZSTD: "zstd", Codec.GZIP: "gzip"}


# ---- LZ4: one block, without a size in front


def _compress_lz4(payload: bytes) -> bytes:
    stored: bytes = lz4.block.compress(payload, store_size=False)
    return stored


def _decompress_lz4(stored: memoryview, uncompressed_bytes: int) -> bytes:
    try:
        # Into a buffer of the declared, checked size: LZ4 fails where it would write beyond.
        payload: bytes = lz4.block.decompress(stored, uncompressed_size=uncompressed_bytes)
    except lz4.block.LZ4BlockError as error:
        raise FormatError(f"LZ4 payload: {error}") from error
    return payload


# ---- zstd: one frame that says how many bytes it holds


def _compress_zstd(payload: bytes) -> bytes:
    return _zstd.compressor.compress(payload)


def _decompress_zstd(stored: memoryview, uncompressed_bytes: int) -> bytes:
    zstandard = _zstandard()
    try:
        # The library allocates what the frame says: asked first. -1: the frame does not say.
        held = zstandard.frame_content_size(stored)
        if held != uncompressed_bytes:
            size = "does not say how many bytes it holds" if held < 0 else f"holds {held} bytes"
            raise FormatError(f"zstd payload {size}, {uncompressed_bytes} declared")
        return _zstd.decompressor.decompress(stored, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FormatError(f"zstd payload: {error}") from error


# ---- gzip: one member


def _compress_gzip(payload: bytes) -> bytes:
    return zlib.compress(payload, GZIP_LEVEL, _GZIP_WBITS)


def _decompress_gzip(stored: memoryview, uncompressed_bytes: int) -> bytes:
    member = zlib.decompressobj(_GZIP_WBITS)
    try:
        # Asks for a byte more than declared: a member that holds more shows it, a member of the right size reaches its
        # end, where its checksum is.
        payload = member.decompress(stored, uncompressed_bytes + 1)
    except zlib.error as error:
        raise FormatError(f"gzip payload: {error}") from error
    if len(payload) > uncompressed_bytes:
        raise FormatError(f"gzip payload holds more than the {uncompressed_bytes} bytes declared")
    if not member.eof:
        raise FormatError("gzip payload: it is cut off")
    if member.unused_data:
        raise FormatError(f"gzip payload: {len(member.unused_data)} bytes after its end")
    return payload


_COMPRESS: dict[Codec, Callable[[bytes], bytes]] = {
    Codec.LZ4: _compress_lz4,
    Codec.ZSTD: _compress_zstd,
    Codec.GZIP: _compress_gzip,
}
_DECOMPRESS: dict[Codec, Callable[[memoryview, int], bytes]] = {
    Codec.LZ4: _decompress_lz4,
    Codec.ZSTD: _decompress_zstd,
    Codec.GZIP: _decompress_gzip,
}
