"""Which positions a consumer stores, and in which order."""

import asyncio
from collections.abc import Mapping

import pytest
from streamhouse.commits import Commits
from streamhouse.core.in_flight import InFlight, Worker
from streamhouse.core.positions import Cursor, Position
from streamhouse.records import Record, TopicPartition

pytestmark = pytest.mark.quick

WHERE = TopicPartition("t", 0)


class Log:
    """Where commits are stored; the first one takes until `answers` is set."""

    def __init__(self) -> None:
        self.stored: list[int] = []
        self.answers = asyncio.Event()
        self._asked = 0

    async def store(self, positions: Mapping[TopicPartition, Position]) -> None:
        self._asked += 1
        if self._asked == 1:
            await self.answers.wait()
        self.stored.append(positions[WHERE].offset)


@pytest.fixture
def cursors() -> dict[TopicPartition, Cursor]:
    """3 is in hand."""
    cursor = Cursor.at(WHERE, 3)
    cursor.delivered = 4
    return {WHERE: cursor}


@pytest.fixture
def worker(cursors: dict[TopicPartition, Cursor], in_flight: InFlight) -> Worker:
    """Has it."""
    worker = in_flight.worker("a task")
    worker.held = (cursors[WHERE], Record(*WHERE, 3, 0, None, b"3", ()), None)
    return worker


@pytest.fixture
def in_flight() -> InFlight:
    return InFlight(lambda owner: False, lambda owner: False)


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def commits(cursors: dict[TopicPartition, Cursor], in_flight: InFlight, worker: Worker, log: Log) -> Commits:
    return Commits(cursors, in_flight.done_below, log.store, lambda topic, topic_id: None)


async def test_an_automatic_commit_never_goes_behind_the_applications_own(
    commits: Commits, cursors: dict[TopicPartition, Cursor], worker: Worker, log: Log
):
    """The application commits the record in hand, too; the automatic one is asked for before and after that is
    stored."""
    worker.held = None
    own = asyncio.create_task(commits.commit())
    await asyncio.sleep(0)
    automatic = asyncio.create_task(commits.commit_existing())
    await asyncio.sleep(0)
    log.answers.set()
    await asyncio.gather(own, automatic)
    await commits.commit_existing()
    assert log.stored == [4]
    assert cursors[WHERE].committed == 4


async def test_what_a_waiting_commit_stores_is_what_was_done_by_its_turn(
    commits: Commits, cursors: dict[TopicPartition, Cursor], worker: Worker, log: Log
):
    first = asyncio.create_task(commits.commit_existing())
    await asyncio.sleep(0)
    second = asyncio.create_task(commits.commit_existing())
    given = asyncio.create_task(commits.commit({WHERE: Position(2)}))
    await asyncio.sleep(0)
    worker.held = None
    log.answers.set()
    await asyncio.gather(first, second, given)
    assert log.stored == [3, 4, 2]


async def test_partitions_that_are_given_up_wait_for_the_commit_under_way(
    commits: Commits, cursors: dict[TopicPartition, Cursor], worker: Worker, log: Log
):
    worker.held = None
    own = asyncio.create_task(commits.commit())
    await asyncio.sleep(0)
    revoked = {WHERE: cursors.pop(WHERE)}
    revoking = asyncio.create_task(commits.commit_existing(revoked, log.store))
    await asyncio.sleep(0)
    log.answers.set()
    await asyncio.gather(own, revoking)
    assert log.stored == [4], "the record in hand was committed: there is nothing left to store"


async def test_a_seek_back_is_stored(commits: Commits, cursors: dict[TopicPartition, Cursor], worker: Worker, log: Log):
    log.answers.set()
    worker.held = None
    await commits.commit()
    cursors[WHERE] = Cursor.at(WHERE, 1, cursors[WHERE].committed)
    await commits.commit_existing()
    assert log.stored == [4, 1]
