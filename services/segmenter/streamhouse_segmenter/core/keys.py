"""Keys of objects: names under which segments lie in the store. Readers never parse them, people do."""

from collections.abc import Sequence

from shproto.v1 import coordinator_pb2

DATA_PREFIX = "data/"
MIXED_PREFIX = "mixed/"
# The store allows 255 bytes between slashes; "." and 8 digits of the topic id follow the name.
TOPIC_CHARS_MAX = 246
# int64 has at most 19 digits; a 20th so that keys of all partitions sort by offset.
OFFSET_DIGITS = 20


def data_key(topic: str, topic_id: bytes, partition: int, base_offset: int, epoch: int, random_hex: str) -> str:
    """Returns `data/<topic>.<id>/<partition>/<base offset>-<epoch>-<random>.seg`, for an object with one partition's
    records.

    The topic id's digits keep a re-created topic apart, the random part every attempt from every other.
    """
    # Cut for the limit of the store; the id, not the name, keeps two topics apart.
    name = f"{topic[:TOPIC_CHARS_MAX]}.{topic_id.hex()[:8]}"
    return f"{DATA_PREFIX}{name}/{partition}/{base_offset:0{OFFSET_DIGITS}d}-{epoch}-{random_hex}.seg"


def mixed_key(day: str, random_hex: str) -> str:
    """Returns `mixed/<yyyy-mm-dd>/<random>.seg`, for an object with segments of several partitions, back to back."""
    return f"{MIXED_PREFIX}{day}/{random_hex}.seg"


def object_key(slices: Sequence[coordinator_pb2.BufferSlice], day: str, random_hex: str) -> str:
    """Returns the key of the object to be built from `slices` (at least 1)."""
    if len(slices) > 1:
        return mixed_key(day, random_hex)
    only = slices[0]
    return data_key(only.topic, only.topic_id, only.partition, only.base_offset, only.epoch, random_hex)
