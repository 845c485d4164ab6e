"""Long polls at the ends of partitions: a single call to the agent for all readers that wait at the same offset.

Owns: the polls and their readers. Does not own: the use of an answer (fetch.py). Invariants: a poll ends with the
agent's first answer that is news, or when the last reader leaves; until then a poll costs one call in POLL_WAIT_MS for
any number of readers. Each reader has a future of its own: removing a callback from a shared future looks through all
others, which took seconds with thousands of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from shcluster.agent_checks import AgentChecks
from shproto.errors import StreamHouseError, Unavailable
from shproto.keys import PartitionKey
from shproto.services import IngestApi
from shproto.v1 import ingest_pb2
from shruntime.clock import Clock
from shruntime.tasks import Backoff, Tasks

from shread.counters import Counters

# A call at an agent: long enough to cost nothing, short enough that a peer that went silent is noticed.
POLL_WAIT_MS = 10_000
# An agent without an answer this long after POLL_WAIT_MS is silent, and readers get the error.
POLL_LATE_MS = 2_000
# Bytes of the first record after a quiet time and its followers; the rest comes with the next read.
POLL_BYTES = 64 * 1024
# Readers woken before other tasks have a turn.
WAKE_TOGETHER = 64
# Wait before the next call to an agent that answers at once and has nothing new.
AGAIN_FIRST_MS, AGAIN_MS_MAX = 50, 1_000

News = ingest_pb2.ReadTailResponse | StreamHouseError
PollKey = tuple[str, str, PartitionKey, int]  # agent id, address, partition, offset


class _Poll:
    """A poll. `answered`: the agent has answered, without news."""

    def __init__(self) -> None:
        self.readers: dict[asyncio.Future[News], None] = {}
        self.answered = False
        self.task: asyncio.Task[None] | None = None


class TailPolls:
    """Polls shared by all reads of a process; `tasks` owns them. `agents` hears which agents do not answer."""

    def __init__(
        self,
        ingest_at: Callable[[str], IngestApi],
        agents: AgentChecks,
        tasks: Tasks,
        clock: Clock,
        counters: Counters,
    ) -> None:
        self._ingest_at = ingest_at
        self._agents = agents
        self._tasks = tasks
        self._clock = clock
        self._counters = counters
        self._polls: dict[PollKey, _Poll] = {}

    @contextmanager
    def join(self, agent_id: str, address: str, partition: PartitionKey, offset: int) -> Iterator[asyncio.Future[News]]:
        """Yields a future of the agent's first answer that is news to a reader at `offset`: records, or an error."""
        key = (agent_id, address, partition, offset)
        poll = self._polls.get(key)
        if poll is None:
            poll = self._polls[key] = _Poll()
            poll.task = self._tasks.spawn(
                f"tail of {partition.topic_id.hex()}/{partition.partition}", self._run(key, poll)
            )
        news: asyncio.Future[News] = asyncio.get_running_loop().create_future()
        poll.readers[news] = None
        try:
            yield news
        finally:
            poll.readers.pop(news, None)
            if not poll.readers and self._polls.get(key) is poll:
                del self._polls[key]
                assert poll.task is not None, "it was spawned with the poll"
                poll.task.cancel()

    def is_answered(self, agent_id: str, address: str, partition: PartitionKey, offset: int) -> bool:
        """True if the agent has answered the poll at this offset, so that nothing is known to be there."""
        poll = self._polls.get((agent_id, address, partition, offset))
        return poll is not None and poll.answered

    async def _run(self, key: PollKey, poll: _Poll) -> None:
        try:
            news = await self._news(key, poll)
        finally:
            if self._polls.get(key) is poll:
                del self._polls[key]
        for number, reader in enumerate(list(poll.readers), start=1):
            if not reader.done():
                reader.set_result(news)
            if number % WAKE_TOGETHER == 0:
                await asyncio.sleep(0)

    async def _news(self, key: PollKey, poll: _Poll) -> News:
        """Calls the agent until there is news, and returns the news. The first call does not wait: it shows that the
        agent answers."""
        agent_id, address, (topic_id, partition), offset = key
        request = ingest_pb2.ReadTailRequest(
            topic_id=topic_id, partition=partition, offset=offset, max_bytes=POLL_BYTES
        )
        backoff = Backoff(AGAIN_FIRST_MS, AGAIN_MS_MAX)
        while True:
            self._counters.tail_reads += 1
            asked_ms = self._clock.monotonic_ms()
            late_ms = request.max_wait_ms + POLL_LATE_MS
            try:
                async with asyncio.timeout(late_ms / 1000) as guard:
                    with self._agents.calling(agent_id, address, request.max_wait_ms):
                        answer = await self._ingest_at(address).read_tail(request)
            except StreamHouseError as error:
                return error
            except TimeoutError:
                if not guard.expired():
                    raise
                return Unavailable(f"no answer within {late_ms} ms")
            if _is_news(answer, offset):
                return answer
            if poll.answered and self._clock.monotonic_ms() - asked_ms < request.max_wait_ms / 2:
                await self._clock.sleep_ms(backoff.next_ms())
            else:
                backoff.reset()
            poll.answered, request.max_wait_ms = True, POLL_WAIT_MS


def _is_news(answer: ingest_pb2.ReadTailResponse, offset: int) -> bool:
    """False if the log ends at `offset`, as the reader knew."""
    return bool(
        answer.batches or answer.not_held or answer.high_watermark != offset or answer.tail_start_offset > offset
    )
