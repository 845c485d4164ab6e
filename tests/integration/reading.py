"""Reads whole partitions through the query service, and compares them with what was sent."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from shformat import decode_batch
from shproto.services import CoordinatorClient, QueryClient
from shproto.v1 import coordinator_pb2, query_pb2


@dataclass
class PartitionContents:
    """Everything a reader gets of one partition, from its start to its end."""

    offsets: list[int] = field(default_factory=list)
    values: list[bytes | None] = field(default_factory=list)

    def at(self) -> dict[int, bytes | None]:
        return dict(zip(self.offsets, self.values, strict=True))


async def read_partition(query: QueryClient, topic: str, partition: int, from_offset: int = 0) -> PartitionContents:
    """Reads to the high watermark. Fails when the service skips or repeats an offset inside a response."""
    contents = PartitionContents()
    offset = from_offset
    while True:
        request = query_pb2.FetchRequest(topic=topic, partition=partition, offset=offset, max_bytes=8 << 20)
        response = await query.fetch(request)
        assert not response.waiting_reason, response.waiting_reason
        for batch in response.batches:
            records = decode_batch(batch)
            keep = records.offsets >= offset
            first = int(keep.argmax()) if keep.any() else len(records)
            kept = records.slice(first, len(records))
            contents.offsets += kept.offsets.tolist()
            contents.values += kept.values.to_list()
        if not response.batches and response.next_offset == offset:
            if offset >= response.high_watermark:
                return contents
            raise AssertionError(f"{topic}:{partition}: an empty success at {offset}, below {response.high_watermark}")
        offset = response.next_offset


async def registered_ends(coordinator: CoordinatorClient, topic: str) -> list[int]:
    answer = await coordinator.describe_topic(coordinator_pb2.DescribeTopicRequest(topic=topic))
    return [item.registered_end for item in answer.partitions]


def assert_ascending(offsets: Sequence[int], where: str) -> None:
    for before, after in pairwise(offsets):
        assert after > before, f"{where}: offset {after} after {before}"
