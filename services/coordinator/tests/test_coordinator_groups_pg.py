"""Consumer groups against a real PostgreSQL: hand-over, fencing, expiry, long polls."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import asyncpg
import pytest
from shproto.errors import (
    IllegalGeneration,
    InvalidArgument,
    UnknownGroup,
    UnknownMember,
    UnknownPartition,
    UnknownTopic,
)
from shproto.v1 import coordinator_pb2 as pb
from streamhouse_coordinator.api import CoordinatorApi
from streamhouse_coordinator.wiring import CoordinatorService, build

Two = tuple[CoordinatorService, CoordinatorService]
ChangeRows = Callable[..., Awaitable[object]]
# pytest's timeout comes first: a long poll that ends was woken.
LONGER_THAN_A_TEST_MS = 300_000
EXPIRE = "UPDATE group_member_state SET expires_ms = 1 WHERE member_id = $1"


class Member:
    """A well-behaved consumer: gives up what it is not assigned, then says so."""

    def __init__(self, api: CoordinatorApi, group: str = "g", topics: Iterable[str] = ("orders",)) -> None:
        self.api, self.group, self.topics = api, group, list(topics)
        self.id, self.generation, self.pending = "", 0, False
        self.owned: set[tuple[str, int]] = set()

    async def join(self, **extra: int) -> "Member":
        request = pb.JoinGroupRequest(
            group=self.group, member_id=self.id, topics=self.topics, client_id="c", owned=self._owned(), **extra
        )
        self._take(await self.api.join_group(request))
        return self

    async def heartbeat(self, max_wait_ms: int = 0) -> None:
        request = pb.HeartbeatGroupRequest(
            group=self.group,
            member_id=self.id,
            generation=self.generation,
            owned=self._owned(),
            max_wait_ms=max_wait_ms,
        )
        self._take(await self.api.heartbeat_group(request))

    def _owned(self) -> list[pb.TopicPartition]:
        return [pb.TopicPartition(topic=topic, partition=number) for topic, number in self.owned]

    def _take(self, answer: pb.GroupAssignment) -> None:
        self.id, self.generation, self.pending = answer.member_id, answer.generation, answer.pending
        self.owned = {(item.topic, item.partition) for item in answer.assigned}

    async def commit(self, partition: int, offset: int, generation: int | None = None) -> None:
        generation = self.generation if generation is None else generation
        offsets = [pb.OffsetCommit(topic="orders", partition=partition, offset=offset)]
        await self.api.commit_offsets(
            pb.CommitOffsetsRequest(group=self.group, member_id=self.id, generation=generation, offsets=offsets)
        )

    @property
    def numbers(self) -> list[int]:
        return sorted(number for _, number in self.owned)


async def committed(api: CoordinatorApi, group: str = "g") -> dict[int, int]:
    try:
        answer = await api.fetch_offsets(pb.FetchOffsetsRequest(group=group))
    except UnknownGroup:
        return {}
    return {item.partition: item.offset for item in answer.offsets}


@pytest.fixture
async def api(coordinator: CoordinatorService) -> CoordinatorApi:
    await coordinator.api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=4))
    return coordinator.api


async def test_the_new_member_gets_a_partition_only_after_the_old_one_let_go(api: CoordinatorApi) -> None:
    one = await Member(api).join()
    assert one.numbers == [0, 1, 2, 3]
    two = await Member(api).join()
    assert two.owned == set() and two.pending
    await one.heartbeat()
    assert one.numbers == [0, 1]
    await two.heartbeat()
    assert two.owned == set() and two.pending, "the old member has been told, but has not let go yet"
    await one.heartbeat()
    await two.heartbeat()
    assert two.numbers == [2, 3] and not two.pending


async def test_two_members_converge_in_one_round_of_long_polls(api: CoordinatorApi) -> None:
    one = await Member(api).join()
    two = Member(api)

    async def until_settled(member: Member, count: int) -> None:
        while len(member.owned) != count or member.pending:
            await member.heartbeat(max_wait_ms=LONGER_THAN_A_TEST_MS)

    polling = asyncio.create_task(until_settled(one, 2))
    await asyncio.sleep(0.1)
    await two.join()
    await polling
    await asyncio.gather(until_settled(two, 2), one.heartbeat(max_wait_ms=100))
    assert one.numbers + two.numbers == [0, 1, 2, 3]


async def test_long_polls_wake_up_across_coordinators(two_coordinators: Two) -> None:
    here, there = (service.api for service in two_coordinators)
    await here.create_topic(pb.CreateTopicRequest(topic="orders", partitions=2))
    one = await Member(here).join()
    await one.heartbeat()

    async def until_rebalanced() -> None:
        while one.generation == 1:  # the news of its own join may come late, and wake it, too
            await one.heartbeat(max_wait_ms=LONGER_THAN_A_TEST_MS)

    polling = asyncio.create_task(until_rebalanced())
    await asyncio.sleep(0.1)
    two = await Member(there).join()
    await polling
    assert one.generation == two.generation == 2


async def test_members_joining_at_once_through_two_coordinators_share_everything(two_coordinators: Two) -> None:
    apis = [service.api for service in two_coordinators]
    await apis[0].create_topic(pb.CreateTopicRequest(topic="orders", partitions=12))
    members = [Member(apis[number % 2]) for number in range(6)]
    await asyncio.gather(*(member.join() for member in members))
    for _ in range(3):
        await asyncio.gather(*(member.heartbeat() for member in members))
        held = [name for member in members for name in member.owned]
        assert len(held) == len(set(held)), "a partition belongs to two members"
    assert [len(member.owned) for member in members] == [2] * 6


async def test_a_restarted_coordinator_goes_on_with_the_same_group(dsn: str, fast: Callable[..., Any]) -> None:
    first = build(fast(dsn))
    await first.start()
    await first.api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=4))
    one, two = await Member(first.api).join(), await Member(first.api).join()
    for member in (one, one, two, two, one):
        await member.heartbeat()
    await one.commit(0, 17)
    before = one.generation, one.id, one.numbers, two.numbers
    await first.stop()
    again = build(fast(dsn))
    await again.start()
    try:
        one.api = two.api = again.api
        for member in (one, two):
            await member.heartbeat()
        assert (one.generation, one.id, one.numbers, two.numbers) == before, "nobody had to join again, nothing moved"
        await one.commit(1, 18)
        with pytest.raises(IllegalGeneration):
            await one.commit(2, 99)
        assert await committed(again.api) == {0: 17, 1: 18}
        described = await again.api.describe_group(pb.DescribeGroupRequest(group="g"))
        assert {member.member_id for member in described.members} == {one.id, two.id}
    finally:
        await again.stop()


async def test_another_replica_fences_and_expires_as_the_first(two_coordinators: Two, change_rows: ChangeRows) -> None:
    """One replica took the members in; the other hears a heartbeat, a commit, and then nothing more of one of them."""
    here, there = (service.api for service in two_coordinators)
    await here.create_topic(pb.CreateTopicRequest(topic="orders", partitions=4))
    one, two = await Member(here).join(), await Member(here).join()
    await one.heartbeat()
    one.api = two.api = there
    await one.heartbeat()
    await two.heartbeat()
    assert (one.numbers, two.numbers) == ([0, 1], [2, 3])
    await two.commit(2, 5)
    with pytest.raises(IllegalGeneration):
        await one.commit(2, 6)
    two.api = here
    await change_rows(EXPIRE, two.id)
    async with asyncio.timeout(30):
        while one.numbers != [0, 1, 2, 3]:
            await one.heartbeat(max_wait_ms=1_000)
    with pytest.raises(UnknownMember):
        await two.commit(2, 7)
    assert await committed(here) == await committed(there) == {2: 5}


async def test_leaving_and_expiry_free_partitions(api: CoordinatorApi, change_rows: ChangeRows) -> None:
    one, two = await Member(api).join(), await Member(api).join()
    await one.heartbeat()
    await one.heartbeat()
    await two.heartbeat()
    assert two.numbers == [2, 3]
    await change_rows(EXPIRE, two.id)
    async with asyncio.timeout(30):
        while one.numbers != [0, 1, 2, 3]:
            await one.heartbeat(max_wait_ms=2_000)
    with pytest.raises(UnknownMember):
        await two.heartbeat()
    two.id = ""
    await two.join()
    await api.leave_group(pb.LeaveGroupRequest(group="g", member_id=one.id))
    await api.leave_group(pb.LeaveGroupRequest(group="g", member_id=one.id))
    await two.heartbeat()
    assert two.numbers == [0, 1, 2, 3]


async def test_a_heartbeat_is_not_answered_while_its_member_is_being_expired(
    coordinator: CoordinatorService, api: CoordinatorApi, dsn: str, change_rows: ChangeRows
) -> None:
    """Who is told to go on must still be a member: what it works on is given to others otherwise."""
    member = await Member(api).join()
    await member.heartbeat()
    await member.heartbeat()
    connection = await asyncpg.connect(dsn)
    async with connection.transaction():
        await connection.execute("SELECT FROM event_position FOR UPDATE")  # here the expiry has to wait
        await change_rows(EXPIRE, member.id)
        while not await connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
            await asyncio.sleep(0.01)
        beating = asyncio.create_task(member.heartbeat())
        await asyncio.wait([beating], timeout=1)
        assert not beating.done(), "its member is on the way out"
    with pytest.raises(UnknownMember):
        await beating
    await connection.close()


async def test_joining_again_as_before_changes_nothing(api: CoordinatorApi) -> None:
    one = await Member(api).join()
    generation = one.generation
    await one.join()
    assert (one.generation, one.numbers) == (generation, [0, 1, 2, 3])


async def test_a_member_that_changes_its_topics_keeps_what_it_works_on_until_it_lets_go(api: CoordinatorApi) -> None:
    """The others wait for what it still has, as after any rebalance, and it may still commit it."""
    await api.create_topic(pb.CreateTopicRequest(topic="refunds", partitions=4))
    first = await Member(api).join()
    second = await Member(api).join()
    await first.heartbeat()
    await first.heartbeat()
    await second.heartbeat()
    had = set(first.owned)
    assert len(had) == len(second.owned) == 2
    first.topics = ["refunds"]
    await first.join()
    given = {("refunds", number) for number in range(4)}
    assert first.owned == given, "nobody else reads them"
    await second.heartbeat()
    assert second.pending and second.owned.isdisjoint(had)
    for _, number in had:
        await first.commit(number, 7)
    first.owned = given | had
    await first.join()  # as one whose first answer was lost
    await second.heartbeat()
    assert second.pending and second.owned.isdisjoint(had)
    await first.heartbeat()
    await second.heartbeat()
    assert not second.pending and second.owned == {("orders", number) for number in range(4)}
    with pytest.raises(IllegalGeneration):
        await first.commit(min(had)[1], 8)


async def test_a_member_may_read_no_topic_yet(api: CoordinatorApi) -> None:
    first = await Member(api, topics=()).join()
    assert (first.owned, first.pending) == (set(), False)
    second = await Member(api).join()
    assert len(second.owned) == 4
    first.topics = ["orders"]
    await first.join()
    await second.heartbeat()
    await second.heartbeat()
    await first.heartbeat()
    assert len(first.owned) == len(second.owned) == 2


@pytest.mark.long
async def test_a_heartbeat_without_news_waits_and_keeps_the_member_alive(api: CoordinatorApi) -> None:
    one = await Member(api).join(session_timeout_ms=6_000)
    for _ in range(3):  # each one waits half the session timeout, so that the third ends beyond it
        await one.heartbeat(max_wait_ms=60_000)
    assert one.numbers == [0, 1, 2, 3]


async def test_commits_are_fenced_by_generation_and_ownership(api: CoordinatorApi) -> None:
    one = await Member(api).join()
    await one.commit(0, 10)
    await one.commit(3, 10)
    two = await Member(api).join()
    await one.commit(3, 11)  # told nothing yet: still its own, though the generation is old
    with pytest.raises(IllegalGeneration):
        await two.commit(3, 5, generation=two.generation)
    await one.heartbeat()
    await one.heartbeat()
    await two.heartbeat()
    with pytest.raises(IllegalGeneration):
        await one.commit(3, 12)
    await two.commit(3, 20)
    with pytest.raises(UnknownMember):
        await api.commit_offsets(pb.CommitOffsetsRequest(group="g", member_id="stranger", generation=2))
    assert await committed(api) == {0: 10, 3: 20}


async def test_plain_commits_only_while_the_group_is_empty(api: CoordinatorApi) -> None:
    offsets = [pb.OffsetCommit(topic="orders", partition=1, offset=7, metadata="note")]
    plain = pb.CommitOffsetsRequest(group="g", offsets=offsets)
    await api.commit_offsets(plain)
    await api.commit_offsets(plain)
    one = await Member(api).join()
    with pytest.raises(IllegalGeneration):
        await api.commit_offsets(plain)
    await api.leave_group(pb.LeaveGroupRequest(group="g", member_id=one.id))
    await api.commit_offsets(plain)
    wanted = [pb.TopicPartition(topic="orders", partition=number) for number in (1, 2)]
    answer = await api.fetch_offsets(pb.FetchOffsetsRequest(group="g", partitions=wanted))
    assert [(item.offset, item.metadata) for item in answer.offsets] == [(7, "note"), (-1, "")]


async def test_commits_of_what_does_not_exist_change_nothing(api: CoordinatorApi) -> None:
    good = pb.OffsetCommit(topic="orders", partition=0, offset=1)
    for bad, error in (
        (pb.OffsetCommit(topic="nope", partition=0, offset=1), UnknownTopic),
        (pb.OffsetCommit(topic="orders", partition=4, offset=1), UnknownPartition),
        (pb.OffsetCommit(topic="orders", partition=0, offset=-1), InvalidArgument),
    ):
        with pytest.raises(error):
            await api.commit_offsets(pb.CommitOffsetsRequest(group="g", offsets=[good, bad]))
    assert await committed(api) == {}


async def test_a_position_in_a_deleted_topic_is_not_one_in_the_topic_created_again(api: CoordinatorApi) -> None:
    """A member that lived through both and was told of neither still owns the partition, by its name."""
    await api.create_topic(pb.CreateTopicRequest(topic="other", partitions=1))
    one = await Member(api, topics=["orders", "other"]).join()
    old = (await api.describe_topic(pb.DescribeTopicRequest(topic="orders"))).topic.topic_id
    await api.delete_topic(pb.DeleteTopicRequest(topic="orders"))
    new = (await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=4))).topic_id

    async def commit(topic_id: bytes, offset: int) -> None:
        offsets = [
            pb.OffsetCommit(topic="other", partition=0, offset=offset),
            pb.OffsetCommit(topic="orders", partition=1, offset=offset, topic_id=topic_id),
        ]
        await api.commit_offsets(
            pb.CommitOffsetsRequest(group="g", member_id=one.id, generation=one.generation, offsets=offsets)
        )

    with pytest.raises(UnknownTopic, match="another one") as refused:
        await commit(old, 40)
    assert refused.value.details["topic"] == "orders"
    with pytest.raises(InvalidArgument, match="topic_id"):
        await commit(b"short", 40)
    assert not (await api.fetch_offsets(pb.FetchOffsetsRequest(group="g"))).offsets, "all or none"
    await commit(new, 2)
    answer = await api.fetch_offsets(pb.FetchOffsetsRequest(group="g"))
    assert [(item.topic, item.offset) for item in answer.offsets] == [("orders", 2), ("other", 2)]
    assert answer.offsets[0].topic_id == new


async def test_a_commit_without_members_names_its_topic_too(api: CoordinatorApi) -> None:
    old = (await api.describe_topic(pb.DescribeTopicRequest(topic="orders"))).topic.topic_id
    one = pb.OffsetCommit(topic="orders", partition=1, offset=3, topic_id=old)
    await api.commit_offsets(pb.CommitOffsetsRequest(group="g", offsets=[one]))
    await api.delete_topic(pb.DeleteTopicRequest(topic="orders"))
    with pytest.raises(UnknownTopic, match="does not exist"):
        await api.commit_offsets(pb.CommitOffsetsRequest(group="g", offsets=[one]))
    new = (await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=4))).topic_id
    with pytest.raises(UnknownTopic, match="another one"):
        await api.commit_offsets(pb.CommitOffsetsRequest(group="g", offsets=[one]))
    assert await committed(api) == {}
    one.topic_id = new
    await api.commit_offsets(pb.CommitOffsetsRequest(group="g", offsets=[one]))
    assert (await api.fetch_offsets(pb.FetchOffsetsRequest(group="g"))).offsets[0].topic_id == new


async def test_a_group_nobody_has_heard_of(api: CoordinatorApi) -> None:
    with pytest.raises(UnknownGroup):
        await api.fetch_offsets(pb.FetchOffsetsRequest(group="nope"))
    some = [pb.TopicPartition(topic="orders", partition=1)]
    answer = await api.fetch_offsets(pb.FetchOffsetsRequest(group="nope", partitions=some))
    assert [item.offset for item in answer.offsets] == [-1]
    await Member(api, "known").join()
    assert not (await api.fetch_offsets(pb.FetchOffsetsRequest(group="known"))).offsets


async def test_topics_that_come_and_go_are_picked_up(api: CoordinatorApi) -> None:
    one = await Member(api, topics=["orders", "later"]).join()
    await one.heartbeat()
    await api.create_topic(pb.CreateTopicRequest(topic="later", partitions=1))
    await one.heartbeat()
    assert ("later", 0) in one.owned and len(one.owned) == 5
    await api.delete_topic(pb.DeleteTopicRequest(topic="orders"))
    await one.heartbeat()
    assert one.owned == {("later", 0)}


async def test_offsets_go_with_their_topic(api: CoordinatorApi) -> None:
    plain = pb.CommitOffsetsRequest(group="g", offsets=[pb.OffsetCommit(topic="orders", partition=1, offset=7)])
    await api.commit_offsets(plain)
    await api.delete_topic(pb.DeleteTopicRequest(topic="orders"))
    await api.create_topic(pb.CreateTopicRequest(topic="orders", partitions=4))
    assert await committed(api) == {}
