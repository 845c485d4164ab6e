"""Keys by which services name a partition, one epoch of it, and a partition as users see it. Pure: values.

A key has the id of a topic, not the name: a topic that is created again under a name is another topic. In memory
and in messages the id has 16 bytes; its hex form stands in events, table rows and text only.
"""

from typing import NamedTuple

TopicId = bytes
"""The 16 bytes of a topic's UUID."""


class PartitionKey(NamedTuple):
    """A partition of a topic; equal to, and usable as, the plain tuple."""

    topic_id: TopicId
    partition: int


class RangeKey(NamedTuple):
    """The offsets of a partition that one epoch owns, and the part of a write-ahead log that holds their records."""

    topic_id: TopicId
    partition: int
    epoch: int

    @property
    def partition_key(self) -> PartitionKey:
        """Key of the partition that the range is a part of."""
        return PartitionKey(self.topic_id, self.partition)


class TopicPartition(NamedTuple):
    """A partition of a topic, by name; equal to, and usable as, the plain tuple."""

    topic: str
    partition: int
