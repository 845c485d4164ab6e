"""Members of a group that come, go, hang and are forgotten, each with a sink that writes and commits in on_revoked.

Every record is written. Between on_revoked of one member and on_assigned of the next nothing is written twice; only
what a member had written and not committed when the group forgot it is, and only of partitions that it had then.
"""

import asyncio
import random
from collections import Counter

import pytest
from shproto.errors import IllegalGeneration, UnknownMember
from streamhouse import Consumer, Producer

PATIENCE_S = 60
PARTITIONS, FLUSH_RECORDS = 6, 7


class Log:
    """Steps of all members, in order: (what, member, partition)."""

    def __init__(self):
        self.events = []
        self.written = Counter()  # by partition and offset
        self.unclean = set()  # partitions of members that the group forgot

    def add(self, what, member, partitions):
        self.events += [(what, member, where.partition) for where in partitions]


class Member:
    """Gathers records, and writes them to the log when it has some or is to give their partitions up."""

    def __init__(self, name, platform, log):
        self.name, self.platform, self.log = name, platform, log
        self.buffer = []
        self.consumer = Consumer(
            platform.address,
            ["t"],
            group="g",
            auto_commit=False,
            on_assigned=self.on_assigned,
            on_revoked=self.on_revoked,
            on_lost=self.on_lost,
        )
        self.task = asyncio.create_task(self._run())

    async def _run(self):
        while True:
            try:
                async for record in self.consumer:
                    self.buffer.append(record)
                    if len(self.buffer) >= FLUSH_RECORDS:
                        await self._flush()
                return
            except (UnknownMember, IllegalGeneration):
                continue  # the group forgot it while it committed: on_lost is next

    async def _flush(self, partitions=None):
        offsets, rest = {}, []
        for record in self.buffer:
            where = (record.topic, record.partition)
            if partitions is None or where in partitions:
                self.log.written[record.partition, record.offset] += 1
                offsets[where] = record.offset + 1
            else:
                rest.append(record)
        self.buffer = rest
        if offsets:
            await self.consumer.commit(offsets)

    async def on_assigned(self, partitions):
        self.log.add("assigned", self.name, partitions)

    async def on_revoked(self, partitions):
        await asyncio.sleep(0.01)
        await self._flush(partitions)
        self.log.add("gone", self.name, partitions)

    async def on_lost(self, partitions):
        self.buffer = [record for record in self.buffer if (record.topic, record.partition) not in partitions]
        self.log.add("lost", self.name, partitions)

    @property
    def member_ids(self):
        member = self.consumer._membership
        return {member.member_id, member._joining_id} if member is not None else set()

    async def forget(self):
        """The group expels it; it does not know."""
        await expel(self.platform, self.log, self.consumer.membership.member_id)

    async def hang(self):
        """It stands still, heartbeats and all, until its session expires."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        await self.consumer._tasks.stop()

    async def leave(self):
        await self.consumer.close()
        await asyncio.wait_for(self.task, PATIENCE_S)


async def expel(platform, log, member_id):
    owned = platform.group("g").owned.get(member_id, frozenset())
    log.unclean |= {int(name.rpartition(":")[2]) for name in owned}
    await platform.expel("g", member_id)


async def expire(platform, log, members):
    """Ends the sessions of members that hang; perhaps they hung while they joined."""
    alive = set().union(*(member.member_ids for member in members))
    for member_id in platform.group("g").members - alive:
        await expel(platform, log, member_id)


async def produce(platform, count):
    async with Producer(platform.address) as producer:
        for partition in range(PARTITIONS):
            await producer.send_many("t", [b""] * count, partition=partition)


def read_by(members):
    """Returns how far the members together have read; without partitions that are on their way between two."""
    return {where: at for member in members for where, at in member.consumer.positions().items()}


async def settled(members):
    async with asyncio.timeout(PATIENCE_S):
        while not all(member.consumer.membership.state == "stable" for member in members):
            for member in members:
                if member.task.done():
                    member.task.result()
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 6))])
@pytest.mark.parametrize("faults", [False, True], ids=["clean", "hanging and forgotten"])
async def test_no_record_is_left_out_and_none_is_written_twice_in_a_clean_hand_over(platform, seed, faults):
    rng, log = random.Random(seed), Log()
    await platform.create_topic("t", PARTITIONS)
    members = [Member(f"member {number}", platform, log) for number in range(3)]
    hung = []
    produced = 0
    for step in range(8):
        count = rng.randrange(1, 30)
        await produce(platform, count)
        produced += count
        if rng.random() < 0.5:
            await settled(members)
        act = rng.choice(["join", "leave", *(["hang", "forget"] if faults else [])])
        if act == "join" or len(members) == 1:
            members.append(Member(f"member {step + 3}", platform, log))
            continue
        member = rng.choice(members)
        if member.consumer.membership.state == "out":
            continue  # it has not even started
        if act == "forget":
            await member.forget()
            continue
        members.remove(member)
        if act == "leave":
            await member.leave()
        else:
            await member.hang()
            hung.append(member)
            await expire(platform, log, members)
    async with asyncio.timeout(PATIENCE_S):
        while read_by(members) != {("t", number): produced for number in range(PARTITIONS)}:
            if hung:
                await expire(platform, log, members)
            await asyncio.sleep(0.01)
    for member in members:
        await member.leave()
    for member in hung:
        await member.consumer._peers.close()
    check(log, produced)
    assert {where[1]: at for where, at in platform.group("g").offsets.items()} == dict.fromkeys(range(6), produced)


def check(log, produced):
    for partition in range(PARTITIONS):
        times = [log.written[partition, offset] for offset in range(produced)]
        assert 0 not in times, f"partition {partition}: offset {times.index(0)} was never written"
        if partition not in log.unclean:
            assert set(times) == {1}, f"partition {partition} was handed over in order, and written {times} times"
            steps = [(what, member) for what, member, number in log.events if number == partition]
            for (first, one), (second, other) in zip(steps[::2], steps[1::2], strict=True):
                assert (first, second) == ("assigned", "gone") and one == other, "one owner at a time"
