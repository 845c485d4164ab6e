"""Kafka's default partitioner, so that a key has the same partition as in Kafka.

murmur2 as in org.apache.kafka.common.utils.Utils (seed 0x9747b28c), for a single key and for many at once.
"""

import numpy as np
from numpy.typing import NDArray

from .columns import BytesColumn

_SEED = 0x9747B28C
_M = 0x5BD1E995
_MASK = 0xFFFFFFFF
_POSITIVE = 0x7FFFFFFF
# Beyond this, rounds over few long keys cost more than hashing each of them alone.
_VECTOR_BYTES_MAX = 256


def murmur2(key: bytes) -> int:
    """Returns the 32-bit hash of `key`, 0 to 2**32 - 1 (Kafka's number is the same, signed)."""
    size = len(key)
    h = _SEED ^ size
    whole = size & ~3
    for at in range(0, whole, 4):
        k = (int.from_bytes(key[at : at + 4], "little") * _M) & _MASK
        k = ((k ^ (k >> 24)) * _M) & _MASK
        h = ((h * _M) & _MASK) ^ k
    if size != whole:
        h = ((h ^ int.from_bytes(key[whole:], "little")) * _M) & _MASK
    h = ((h ^ (h >> 13)) * _M) & _MASK
    return h ^ (h >> 15)


def partition_of(key: bytes, partitions: int) -> int:
    """Returns the partition of `key` among `partitions`, 0 to partitions - 1, as Kafka's default partitioner does."""
    return (murmur2(key) & _POSITIVE) % partitions


def murmur2_many(keys: BytesColumn) -> NDArray[np.uint32]:
    """Returns the hashes of all keys, uint32 of shape (n,); a null key hashes as an empty key."""
    starts, sizes = _spans(keys)
    # Padded, so that a four-byte read at any key's end stays inside.
    data = np.frombuffer(b"".join((keys.data, b"\0\0\0\0")), np.uint8)
    words: NDArray[np.uint32] = np.ndarray((len(data) - 3,), np.dtype("<u4"), data, 0, (1,))
    hashes = np.uint32(_SEED) ^ sizes.astype(np.uint32)
    # Longest first: in each round the keys with a word left are a prefix.
    order = np.argsort(-sizes, kind="stable")
    ordered_sizes = sizes[order]
    longs = int(np.searchsorted(-ordered_sizes, -_VECTOR_BYTES_MAX, side="left"))
    vector = order[longs:]
    if len(vector):
        hashes[vector] = _hash_ordered(words, starts[vector], sizes[vector], hashes[vector])
    for index in order[:longs].tolist():
        start = int(starts[index])
        hashes[index] = murmur2(bytes(keys.data[start : start + int(sizes[index])]))
    return hashes


def partitions_of(keys: BytesColumn, partitions: int) -> NDArray[np.int64]:
    """Returns the partition of every key, int64 of shape (n,); the caller has to replace the partitions of null
    keys."""
    return (murmur2_many(keys) & np.uint32(_POSITIVE)).astype(np.int64) % partitions


def _spans(keys: BytesColumn) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    sizes = np.diff(keys.ends, prepend=0)
    return keys.ends - sizes, sizes


def _hash_ordered(
    words: NDArray[np.uint32], starts: NDArray[np.int64], sizes: NDArray[np.int64], h: NDArray[np.uint32]
) -> NDArray[np.uint32]:
    """Returns the hashes of keys sorted by length, the longest first; uint32 arithmetic wraps, as the algorithm
    requires."""
    m = np.uint32(_M)
    word_counts = sizes >> 2
    for turn in range(int(word_counts[0])):
        active = int(np.searchsorted(-word_counts, -turn, side="left"))
        k = words[starts[:active] + 4 * turn] * m
        k ^= k >> np.uint32(24)
        k *= m
        h[:active] = h[:active] * m ^ k
    rest = (sizes & 3).astype(np.uint32)
    tail = words[starts + (word_counts << 2)] & ((np.uint32(1) << (rest * np.uint32(8))) - np.uint32(1))
    h = np.where(rest > 0, (h ^ tail) * m, h)
    h ^= h >> np.uint32(13)
    h *= m
    h ^= h >> np.uint32(15)
    return h
