"""Creates, alters and deletes topics."""

from dataclasses import replace

from shproto.events import TopicCreated, TopicDeleted

from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core import topics
from streamhouse_coordinator.core.projection import Remove
from streamhouse_coordinator.ports import Transaction, where
from streamhouse_coordinator.service.common import (
    Context,
    change_leadership,
    commit_leadership,
    topic_named,
)


async def create_topic(context: Context, command: TopicCreated) -> t.TopicRow:
    """Creates a topic and returns its row. `command` comes without topic_id and created_ms. Raises InvalidArgument,
    TopicExists, Overloaded."""
    settings = context.settings
    topics.check_create(command, settings.partitions_per_topic_max)
    topic_id = context.new_id().replace("-", "")

    async def work(tx: Transaction) -> t.TopicRow:
        same_name = await tx.select(t.TOPICS, where(topic=command.topic))
        # The cluster lock keeps other creations out, so the count and the name hold until the commit.
        count = (await tx.totals(t.TOPICS, where()))[0].count
        asked = replace(command, topic_id=topic_id, created_ms=await tx.now_ms())
        event = topics.create(asked, same_name, count, settings.topics_max)
        await commit_leadership(tx, settings, [event])
        return (await tx.select(t.TOPICS, where(topic_id=topic_id)))[0]

    return await change_leadership(context, work)


async def alter_topic(context: Context, command: topics.AlterTopic) -> t.TopicRow:
    """Alters a topic and returns its row. New partitions get leaders at once; leaders learn of another min_acks with
    their next heartbeat. Raises InvalidArgument, UnknownTopic."""
    topics.check_alter(command, context.settings.partitions_per_topic_max)

    async def work(tx: Transaction) -> t.TopicRow:
        topic = await topic_named(tx, command.topic, lock="wait")
        event = topics.alter(command, topic)
        if event is None:
            return topic
        await commit_leadership(tx, context.settings, [event])
        return (await tx.select(t.TOPICS, where(topic_id=topic.topic_id)))[0]

    return await change_leadership(context, work)


async def delete_topic(context: Context, name: str) -> str:
    """Deletes a topic with its ranges, segments (their objects become unreferenced) and offsets. Returns its id. Raises
    UnknownTopic."""

    async def work(tx: Transaction) -> str:
        # Waits for commits of offsets, which share the row; those that come later find no topic.
        topic = await topic_named(tx, name, lock="wait")
        of_topic = where(topic_id=topic.topic_id)
        # Locked before the removal, so that no registration is under way in the topic.
        await tx.select(t.RANGES, of_topic, lock="wait")
        await tx.select(t.PARTITIONS, of_topic, lock="wait")
        await commit_leadership(tx, context.settings, [TopicDeleted(topic.topic_id, name, await tx.now_ms())])
        # State is no projection, so the event does not remove it.
        state = (t.PRODUCER_SNAPSHOTS, t.PRODUCER_FENCES, t.LOST_SPANS, t.COMPACTION_CLAIMS, t.GROUP_OFFSETS)
        await tx.apply([Remove(table, {"topic_id": topic.topic_id}) for table in state])
        return topic.topic_id

    return await change_leadership(context, work)
