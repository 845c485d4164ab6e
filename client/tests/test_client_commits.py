"""Which positions a consumer stores, and in which order."""

import asyncio
from collections.abc import Mapping

from streamhouse.commits import Commits
from streamhouse.core.positions import Cursor, Position
from streamhouse.records import TopicPartition

WHERE = TopicPartition("t", 0)


async def test_a_later_commit_waits_for_the_one_under_way():
    """The automatic one and the application's, or that of close(): on its own way the older could be stored last."""
    stored, slow = [], asyncio.Event()

    async def store(positions: Mapping[TopicPartition, Position]) -> None:
        if not stored:
            await slow.wait()
        stored.append(positions[WHERE].offset)

    cursor = Cursor.at(WHERE, 0)
    commits = Commits({WHERE: cursor}, store, lambda topic, topic_id: None)
    asked = []
    for offset in (4, 5):
        cursor.delivered = offset
        asked.append(asyncio.create_task(commits.commit(commits.outstanding(done_with_last=True))))
        await asyncio.sleep(0)
    asked.append(asyncio.create_task(commits.in_turn(store, {WHERE: Position(6)})))
    await asyncio.sleep(0)
    slow.set()
    await asyncio.gather(*asked)
    assert stored == [4, 5, 6]
    assert cursor.committed == 5
