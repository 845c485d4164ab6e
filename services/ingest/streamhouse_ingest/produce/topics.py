"""Looks up partitions that this agent does not lead, and offsets in ranges that it does not hold.

Owns: the recent answers of the coordinator, by topic name. Does not own: the held logs.
Invariants: at most _NAMES_MAX answers are remembered, each for _REMEMBER_MS; callers of a name share a single request.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Collection, Coroutine
from typing import Any

from shproto.errors import DataLoss, InvalidArgument, StreamHouseError, Unavailable, UnknownPartition, UnknownTopic
from shproto.keys import RangeKey
from shproto.limits import NAME_LENGTH_MAX
from shproto.services import CoordinatorApi
from shproto.v1 import coordinator_pb2 as pb
from shproto.v1 import types_pb2
from shruntime.clock import Clock
from shruntime.tasks import ends_within

from streamhouse_ingest.log.logs import HeldLog, Logs, not_leader
from streamhouse_ingest.log.partition_log import PartitionLog

# Long enough that a producer in a retry loop asks the coordinator once a second, short enough for a new topic.
_REMEMBER_MS = 1_000
# Limit of the remembered names, because any client can invent names; the oldest are forgotten.
_NAMES_MAX = 1_024

Answer = pb.TopicMetadata | StreamHouseError | None


class TopicLookup:
    """Asks the coordinator, at most once per name and second, for any number of producers."""

    def __init__(
        self,
        logs: Logs,
        coordinator: CoordinatorApi,
        clock: Clock,
        agent_id: str,
        refresh_grants: Callable[[Collection[RangeKey]], Coroutine[Any, Any, None]],
    ) -> None:
        self._logs = logs
        self._coordinator = coordinator
        self._clock = clock
        self._agent_id = agent_id
        self._refresh_grants = refresh_grants
        self._known: OrderedDict[str, tuple[int, asyncio.Future[Answer]]] = OrderedDict()

    async def find_leader(self, topic: str, partition: int) -> HeldLog:
        """Returns the log to append to if this agent leads after all, because a grant has just arrived.

        Raises UnknownTopic, UnknownPartition, NotLeader, InvalidArgument for the length of the name, and the errors of
        the coordinator.
        """
        if not 0 < len(topic) <= NAME_LENGTH_MAX:
            raise InvalidArgument(
                f"topic has {len(topic)} characters, must be 1 to {NAME_LENGTH_MAX}",
                field="topic",
                value=topic[:NAME_LENGTH_MAX],
                limit=NAME_LENGTH_MAX,
            )
        metadata = await self._metadata(topic)
        if metadata is None:
            raise UnknownTopic(f"there is no topic {topic}", topic=topic)
        if partition >= metadata.topic.partitions:
            count = metadata.topic.partitions
            raise UnknownPartition(
                f"topic {topic} has partitions 0 to {count - 1}, not {partition}",
                topic=topic,
                partition=partition,
                partitions=count,
            )
        held = self._logs.led(topic, partition)
        if held is None:
            leader = next((item.agent_id for item in metadata.leaders if item.partition == partition), "")
            raise not_leader(topic, partition, f"its leader is {leader}" if leader else "it has no leader now")
        return held

    async def is_registered(self, log: PartitionLog, offset: int) -> bool:
        """True if a batch written at `offset`, in an older range of the log's partition, is in a segment; False also if
        the coordinator cannot answer.

        Raises DataLoss if the batch is recorded as lost or its range was declared lost, NotLeader if the topic is
        deleted.
        """
        try:
            described = await self._coordinator.describe_topic(pb.DescribeTopicRequest(topic=log.topic))
        except UnknownTopic:
            described = pb.DescribeTopicResponse()
        # No answer proves nothing: the caller asks again until its deadline.
        except StreamHouseError:
            return False
        if described.topic.topic_id != log.key.topic_id:
            raise not_leader(log.topic, log.key.partition, "the topic was deleted")
        info = described.partitions[log.key.partition]
        for span in info.lost:
            if span.base_offset <= offset < span.end_offset:
                raise _on_record_as_lost(log, span, offset)
        for owned in info.ranges:
            end_offset = owned.end_offset if owned.HasField("end_offset") else owned.limit_offset
            if owned.registered_end <= offset < end_offset:
                if owned.status == "lost":
                    raise _declared_lost(log, owned, offset)
                return False
        return True

    async def _metadata(self, topic: str) -> pb.TopicMetadata | None:
        now_ms = self._clock.monotonic_ms()
        known = self._known.get(topic)
        if known is None or now_ms >= known[0]:
            return await self._ask_for_all(topic, now_ms)
        # Shielded: a caller that is cancelled must not cancel the answer for the others.
        answer = await asyncio.shield(known[1])
        if isinstance(answer, StreamHouseError):
            raise answer
        return answer

    async def _ask_for_all(self, topic: str, now_ms: int) -> pb.TopicMetadata | None:
        """Asks the coordinator and returns the answer, which callers during the request and soon after share."""
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        # Removed first, so that the name moves to the end: beyond the limit the oldest answer is forgotten.
        self._known.pop(topic, None)
        self._known[topic] = (now_ms + _REMEMBER_MS, answer)
        if len(self._known) > _NAMES_MAX:
            self._known.popitem(last=False)
        try:
            metadata = await self._ask(topic)
        except StreamHouseError as error:
            answer.set_result(error)
            raise
        except BaseException:  # cancelled, or a defect: callers that share this answer must not wait for ever
            answer.set_result(Unavailable(f"topic {topic} is not led here; asking for its leader was broken off"))
            raise
        answer.set_result(metadata)
        return metadata

    async def _ask(self, topic: str) -> pb.TopicMetadata | None:
        try:
            response = await self._coordinator.get_metadata(pb.GetMetadataRequest(topics=[topic]))
        except UnknownTopic:
            return None
        metadata = next((item for item in response.topics if item.topic.topic == topic), None)
        if metadata is not None and (ours := self._led_by_us(metadata)):
            # The coordinator already names this agent as leader, but the event has not arrived yet.
            await ends_within(self._clock, self._refresh_grants(ours), _REMEMBER_MS)
        return metadata

    def _led_by_us(self, metadata: pb.TopicMetadata) -> list[RangeKey]:
        topic_id = metadata.topic.topic_id
        return [
            RangeKey(topic_id, leader.partition, leader.epoch)
            for leader in metadata.leaders
            if leader.agent_id == self._agent_id
        ]


def _on_record_as_lost(log: PartitionLog, span: pb.LostSpan, offset: int) -> DataLoss:
    return DataLoss(
        f"{log.topic}/{log.key.partition}: the batch was written at offset {offset} in epoch {span.epoch}, and is lost "
        f"before it was in the object store: {span.reason}",
        topic=log.topic,
        partition=log.key.partition,
        base_offset=span.base_offset,
        end_offset=span.end_offset,
    )


def _declared_lost(log: PartitionLog, owned: types_pb2.OffsetRange, offset: int) -> DataLoss:
    return DataLoss(
        f"{log.topic}/{log.key.partition}: the batch was written at offset {offset} in epoch {owned.epoch} of agent "
        f"{owned.agent_id}, and everything from offset {owned.registered_end} on was declared lost",
        topic=log.topic,
        partition=log.key.partition,
        base_offset=owned.registered_end,
        end_offset=owned.end_offset,
    )
