"""Consumers of a run: plain ones that read all partitions, and members of a group that commit what they have read."""

import asyncio
import random
from collections.abc import Mapping, Sequence

from shproto.errors import StreamHouseError
from streamhouse import Admin, Consumer, RecordBatch

from tests.faults.history import (
    Assigned,
    Commit,
    CommitDone,
    Committed,
    FetchCommitted,
    Polled,
    ReadFailed,
    Recorder,
    spans_of,
)
from tests.faults.payload import names_of

Where = tuple[str, int]
RETRY_TIMEOUT_MS = 600_000
REQUEST_TIMEOUT_MS = 3_000
COMMIT_EVERY_S = 1.0
WATCH_EVERY_S = 2.0
RESTART_PAUSE_S = 0.5
REREAD_EVERY_S = (0.1, 1.0)
REREAD_FOR_S = (0.3, 2.0)


def record_poll(recorder: Recorder, process: str, batch: RecordBatch, group: str = "") -> None:
    spans = spans_of(batch.offsets.tolist())
    values = names_of(batch.values.to_list())
    recorder.write(Polled(process, batch.topic, batch.partition, spans, values, group=group))


class PlainConsumer:
    """Reads every partition from its start, for ever; after an error goes on where it was."""

    def __init__(self, process: str, partitions: Sequence[Where], recorder: Recorder) -> None:
        self.process = process
        self.recorder = recorder
        self.positions: dict[Where, int] = dict.fromkeys(partitions, 0)

    async def run(self, bootstrap: str) -> None:
        """Until cancelled."""
        while True:
            try:
                await self._read(bootstrap)
            except StreamHouseError as error:
                self.recorder.write(ReadFailed(self.process, error.reason, error.message[:300]))
                await asyncio.sleep(RESTART_PAUSE_S)

    async def _read(self, bootstrap: str) -> None:
        async with _reader(bootstrap, list(self.positions)) as consumer:
            for where, offset in self.positions.items():
                await consumer.seek(*where, offset)
                self.recorder.write(Assigned(self.process, *where, offset))
            async for batch in consumer.batches():
                record_poll(self.recorder, self.process, batch)
                self.positions[batch.topic, batch.partition] = int(batch.offsets[-1]) + 1


class Rereader:
    """Reads again and again for a moment somewhere where another consumer has been, in one partition: what is new comes
    from the agents, this from segments."""

    def __init__(self, process: str, leader: PlainConsumer, recorder: Recorder, rng: random.Random) -> None:
        self.process = process
        self.recorder = recorder
        self._leader = leader
        self._rng = rng

    async def run(self, bootstrap: str) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(self._rng.uniform(*REREAD_EVERY_S))
            where = self._rng.choice(list(self._leader.positions))
            try:
                async with asyncio.timeout(self._rng.uniform(*REREAD_FOR_S)):
                    await self._read(bootstrap, where, self._rng.randrange(self._leader.positions[where] + 1))
            except TimeoutError:
                continue
            except StreamHouseError as error:
                self.recorder.write(ReadFailed(self.process, error.reason, error.message[:300]))

    async def _read(self, bootstrap: str, where: Where, offset: int) -> None:
        async with _reader(bootstrap, [where]) as consumer:
            await consumer.seek(*where, offset)
            self.recorder.write(Assigned(self.process, *where, offset))
            async for batch in consumer.batches():
                record_poll(self.recorder, self.process, batch)


def _reader(bootstrap: str, partitions: Sequence[Where]) -> Consumer:
    return Consumer(
        bootstrap,
        assign=list(partitions),
        request_timeout_ms=REQUEST_TIMEOUT_MS,
        retry_timeout_ms=RETRY_TIMEOUT_MS,
        start=0,
    )


class GroupMember:
    """A member that commits about once a second, between polls."""

    def __init__(self, process: str, group: str, topics: Sequence[str], recorder: Recorder) -> None:
        self.process = process
        self.group = group
        self.topics = list(topics)
        self.recorder = recorder

    async def run(self, bootstrap: str) -> None:
        """Until cancelled; then leaves. An error makes a new member of it."""
        while True:
            try:
                await self._read(bootstrap)
            except StreamHouseError as error:
                self.recorder.write(ReadFailed(self.process, error.reason, error.message[:300]))
                await asyncio.sleep(RESTART_PAUSE_S)

    async def _read(self, bootstrap: str) -> None:
        consumer = Consumer(
            bootstrap,
            self.topics,
            group=self.group,
            auto_commit=False,
            request_timeout_ms=REQUEST_TIMEOUT_MS,
            retry_timeout_ms=RETRY_TIMEOUT_MS,
        )
        loop = asyncio.get_running_loop()
        async with consumer:
            next_commit_s = loop.time() + COMMIT_EVERY_S
            batches = consumer.batches()
            waiting: asyncio.Task[RecordBatch] | None = None
            try:
                while True:
                    waiting = waiting or asyncio.ensure_future(anext(batches))
                    done, _ = await asyncio.wait([waiting], timeout=max(0, next_commit_s - loop.time()))
                    if done:
                        record_poll(self.recorder, self.process, waiting.result(), self.group)
                        waiting = None
                    if loop.time() >= next_commit_s:
                        await self._commit(consumer)
                        next_commit_s = loop.time() + COMMIT_EVERY_S
            finally:
                if waiting is not None:
                    waiting.cancel()
                    await asyncio.gather(waiting, return_exceptions=True)

    async def _commit(self, consumer: Consumer) -> None:
        """What was handed over. A refusal may come from the second coordinator that was asked, after the first has
        stored the commit and could not say so: only "unknown" is sure."""
        offsets: dict[Where, int] = {(where.topic, where.partition): at for where, at in consumer.positions().items()}
        commits = [
            Commit(self.recorder.new_id(), self.process, self.group, topic, partition, offset)
            for (topic, partition), offset in offsets.items()
        ]
        for commit in commits:
            self.recorder.write(commit)
        outcome = "unknown"
        try:
            if offsets:
                await consumer.commit(offsets)
            outcome = "ok"
        except StreamHouseError as error:
            self.recorder.note(self.process, f"commit failed: {error.reason}: {error.message}"[:200])
        finally:
            for commit in commits:
                self.recorder.write(CommitDone(commit.id, outcome))


class GroupWatcher:
    """Asks again and again what the group has committed."""

    def __init__(self, process: str, group: str, partitions: Sequence[Where], recorder: Recorder) -> None:
        self.process = process
        self.group = group
        self.partitions = list(partitions)
        self.recorder = recorder

    async def run(self, bootstrap: str) -> None:
        """Until cancelled."""
        async with Admin(bootstrap, request_timeout_ms=REQUEST_TIMEOUT_MS) as admin:
            while True:
                await asyncio.sleep(WATCH_EVERY_S)
                await self.look(admin)

    async def look(self, admin: Admin) -> Mapping[Where, int] | None:
        """None while no coordinator answers, or the group does not exist yet."""
        fetches = [
            FetchCommitted(self.recorder.new_id(), self.process, self.group, *where) for where in self.partitions
        ]
        for fetch in fetches:
            self.recorder.write(fetch)
        try:
            answer = await admin.group_offsets(self.group)
        except StreamHouseError:
            return None
        found: dict[Where, int] = {(item.topic, item.partition): item.offset for item in answer}
        for fetch in fetches:
            self.recorder.write(Committed(fetch.id, found.get((fetch.topic, fetch.partition), -1)))
        return found


class Membership:
    """The group's members: one leaves and another one joins whenever `replace` is called."""

    def __init__(
        self, group: str, topics: Sequence[str], bootstrap: str, recorder: Recorder, rng: random.Random
    ) -> None:
        self.group = group
        self._topics = topics
        self._bootstrap = bootstrap
        self._recorder = recorder
        self._rng = rng
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._joined = 0

    def join(self) -> str:
        """A new member; its name."""
        self._joined += 1
        name = f"member-{self._joined}"
        member = GroupMember(name, self.group, self._topics, self._recorder)
        self._tasks[name] = asyncio.create_task(member.run(self._bootstrap), name=name)
        return name

    async def leave(self) -> str:
        """One of them leaves; its name. Raises what it failed with."""
        name = self._rng.choice(sorted(self._tasks))
        await self._end(name)
        return name

    async def close(self) -> None:
        for name in sorted(self._tasks):
            await self._end(name)

    async def _end(self, name: str) -> None:
        """Whoever is cancelled while waiting here leaves the member to close()."""
        task = self._tasks[name]
        task.cancel()
        await asyncio.wait([task])
        del self._tasks[name]
        if not task.cancelled():
            task.result()
