"""Finds the log that a client's request is for."""

from shproto.errors import InvalidArgument
from shproto.limits import TOPIC_ID_BYTES
from shproto.v1 import ingest_pb2 as pb

from streamhouse_ingest.log.logs import HeldLog, Logs, not_leader
from streamhouse_ingest.produce.topics import TopicLookup

Request = pb.ProduceRequest | pb.FenceProducerRequest


async def leading_log(logs: Logs, topics: TopicLookup, request: Request) -> HeldLog:
    """Returns the log that the request is for. Raises NotLeader, UnknownTopic, UnknownPartition, InvalidArgument.

    A topic that was deleted and created again under the same name is a different topic: its batches must not be
    acknowledged into the log of the old topic by an agent that does not know the new topic yet, nor the reverse.
    """
    _check_topic_id(request.topic_id)
    held = logs.led(request.topic, request.partition)
    if held is None or not _is_meant(request, held):
        held = await topics.find_leader(request.topic, request.partition)
    if not _is_meant(request, held):
        why = "another topic of that name was created; one of us does not know it yet"
        raise not_leader(request.topic, request.partition, why)
    return held


def _is_meant(request: Request, held: HeldLog) -> bool:
    """True if the log belongs to the topic that the client means, not to another topic of that name."""
    return not request.topic_id or request.topic_id == held.log.key.topic_id


def _check_topic_id(topic_id: bytes) -> None:
    """Checks the length of the topic id; an empty id is valid. Raises InvalidArgument."""
    if len(topic_id) not in (0, TOPIC_ID_BYTES):
        raise InvalidArgument(
            f"topic_id must have {TOPIC_ID_BYTES} bytes, or none, got {len(topic_id)}",
            field="topic_id",
            limit=TOPIC_ID_BYTES,
            value=len(topic_id),
        )
