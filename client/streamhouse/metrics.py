"""Counters and gauges of producers and consumers."""

from collections.abc import Mapping
from dataclasses import dataclass

from streamhouse.records import TopicPartition


@dataclass(frozen=True, slots=True, kw_only=True)
class ProducerMetrics:
    """Counters of a producer since its creation, and gauges of this moment.

    batches_sent, records_sent, bytes_sent: handed to a leader's stream for the first time; bytes as encoded and
    compressed. batches_retried: tries after the first. records_acked, records_failed: records with an outcome, sent or
    not. records_unacknowledged: accepted records without an outcome yet. buffer_used_bytes: their share of
    buffer_bytes_max.
    """

    batches_sent: int
    batches_retried: int
    records_sent: int
    bytes_sent: int
    records_acked: int
    records_failed: int
    records_unacknowledged: int
    buffer_used_bytes: int
    buffer_bytes_max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerMetrics:
    """Counters of a consumer since its creation, and gauges of this moment.

    records_read, bytes_read: handed to the application; bytes of keys, values and headers. commits, commits_failed:
    requests that stored positions, or were refused. rebalances: answers of the group that assigned or revoked
    partitions. prefetch_used_bytes: share of prefetch_bytes_max, received and not handed over. lag: for each partition
    the offsets from the position to the end of the log in the last response; partitions without a response are missing.
    """

    records_read: int
    bytes_read: int
    commits: int
    commits_failed: int
    rebalances: int
    prefetch_used_bytes: int
    prefetch_bytes_max: int
    lag: Mapping[TopicPartition, int]
