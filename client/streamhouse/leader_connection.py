"""Connection to one leader: a ProduceStream on which requests go out as they come and answers return in their order.

Owns: the requests on the wire, the queues that wait for room on the stream, when to try the leader again. Does not own:
which partition the agent leads, what is sent, retries of batches.
Invariants: every submitted request is answered once, by the leader or by the end of the stream. Two streams never have
the same number, so `stream` tells them apart.
"""

import asyncio
import math
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any, Protocol, cast

from shcluster.peers import Peers
from shproto.errors import StreamHouseError, Unavailable
from shproto.v1 import ingest_pb2
from shruntime.tasks import Backoff

from streamhouse.core.partition_queue import PartitionQueue
from streamhouse.core.producer_batch import ProducerBatch

Sent = tuple[PartitionQueue, ProducerBatch]


class ProduceAnswers(Protocol):
    """Receives the answers of all connections of a producer."""

    def answered(self, connection: "LeaderConnection", sent: Sent, response: ingest_pb2.ProduceResponse) -> None:
        """Handles the answer to one batch."""

    def broken(
        self, connection: "LeaderConnection", sent: list[Sent], unsent: list[Sent], error: StreamHouseError
    ) -> None:
        """Handles the end of a stream: batches `sent` may have been written, batches `unsent` were not."""


class LeaderConnection:
    """`answer_timeout_ms`: a stream whose oldest request waits longer is cut; a leader may hang without closing it."""

    def __init__(
        self,
        address: str,
        peers: Peers,
        answers: ProduceAnswers,
        backoff: Backoff,
        max_in_flight: int,
        answer_timeout_ms: int,
    ) -> None:
        self.address = address
        self._peers = peers
        self._answers = answers
        self._backoff = backoff
        self._max_in_flight = max_in_flight
        self._answer_timeout_s = answer_timeout_ms / 1000
        self.is_open = False
        self.warned = False  # of the broken stream; once, until the leader answers again
        self._stream_number = 0
        self._retry_at_ms = -math.inf
        self._waiting: dict[PartitionQueue, None] = {}  # in the order in which they came
        self._unsent: deque[tuple[Sent, ingest_pb2.ProduceRequest]] = deque()
        self._in_flight: deque[tuple[Sent, float]] = deque()  # and when it left, on the loop's clock
        self._wake = asyncio.Event()
        self._watch: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._stalled = False

    # ---- for the sender

    @property
    def stream(self) -> tuple[str, int]:
        """Identity of the open stream, or of the last one."""
        return self.address, self._stream_number

    @property
    def has_room(self) -> bool:
        """True while fewer than max_in_flight requests are unanswered."""
        return len(self._in_flight) + len(self._unsent) < self._max_in_flight

    def wait_ms(self, now_ms: float) -> float:
        """Returns how long not to open a stream yet; 0 while a stream is open."""
        return 0 if self.is_open else max(0, self._retry_at_ms - now_ms)

    def open(self) -> Coroutine[Any, Any, None]:
        """Begins a stream; requests may be submitted at once. Returns the coroutine that runs the stream to its end."""
        assert not self.is_open, "one stream at a time"
        self.is_open = True
        self._stream_number += 1
        return self._run()

    def submit(self, sent: Sent, request: ingest_pb2.ProduceRequest) -> None:
        """Sends `request` after those submitted before."""
        self._unsent.append((sent, request))
        self._wake.set()

    def wait_for_room(self, queue: PartitionQueue) -> None:
        """Puts a queue behind the queues that wait already."""
        self._waiting.setdefault(queue)

    @property
    def waiting_count(self) -> int:
        """Number of queues that wait for room."""
        return len(self._waiting)

    def next_waiting(self) -> PartitionQueue | None:
        """Removes and returns the first waiting queue; None while the stream is full, or no queue waits."""
        if not self._waiting or (self.is_open and not self.has_room):
            return None
        queue = next(iter(self._waiting))
        del self._waiting[queue]
        return queue

    # ---- the stream

    async def _run(self) -> None:
        """Reads the answers of a stream until it ends."""
        self._task = asyncio.current_task()
        error: StreamHouseError = Unavailable(f"the leader at {self.address} ended the stream")
        try:
            await self._peers.connect(self.address)  # until then nothing can have been written
            async with aclosing(self._call()) as responses:
                async for response in responses:
                    # Answers carry no number, they belong to the requests in order: one too many makes the next ones
                    # unreliable.
                    if not self._in_flight:
                        error = Unavailable(f"the leader at {self.address} answered what was not asked")
                        break
                    sent, _ = self._in_flight.popleft()
                    self._backoff.reset()  # the leader answers: the next failure is the first again
                    self.warned = False
                    self._answers.answered(self, sent, response)
        except StreamHouseError as raised:
            error = raised
        except asyncio.CancelledError:
            if not self._stalled or self._task is None or self._task.uncancel():
                raise
            error = Unavailable(f"the leader at {self.address} did not answer within {self._answer_timeout_s} s")
        finally:
            self.is_open = False
            self._stalled = False
            self._wake.set()  # gRPC waits for more requests even after the call has failed
            if self._watch is not None:
                self._watch.cancel()
                self._watch = None
        self._retry_at_ms = asyncio.get_running_loop().time() * 1000 + self._backoff.next_ms()
        sent_batches, unsent = [sent for sent, _ in self._in_flight], [sent for sent, _ in self._unsent]
        self._in_flight.clear()
        self._unsent.clear()
        self._answers.broken(self, sent_batches, unsent, error)

    def _call(self) -> AsyncGenerator[ingest_pb2.ProduceResponse, None]:
        """Begins the call. Returns its answers; the generated clients' streams are generators, and closing them cancels
        the call."""
        api = self._peers.ingest(self.address)
        return cast(
            "AsyncGenerator[ingest_pb2.ProduceResponse, None]", api.produce_stream(self._requests(self._stream_number))
        )

    async def _requests(self, number: int) -> AsyncIterator[ingest_pb2.ProduceRequest]:
        """Yields requests for the stream with this number; gRPC may still ask after the next stream has begun."""
        while self.is_open and self._stream_number == number:
            if self._unsent:
                # In flight before gRPC has the request: it may write it and never ask for another, so from here on the
                # outcome is unknown.
                sent, request = self._unsent.popleft()
                self._in_flight.append((sent, asyncio.get_running_loop().time()))
                self._start_watch()
                yield request
            else:
                self._wake.clear()
                await self._wake.wait()

    def _start_watch(self) -> None:
        if self._watch is None:
            self._watch = asyncio.get_running_loop().call_later(self._answer_timeout_s, self._check_answers)

    def _check_answers(self) -> None:
        """Cuts the stream once its oldest request has waited too long."""
        self._watch = None
        if not self._in_flight:
            return
        loop = asyncio.get_running_loop()
        due_s = self._in_flight[0][1] + self._answer_timeout_s
        if loop.time() < due_s:
            self._watch = loop.call_at(due_s, self._check_answers)
        elif self._task is not None:
            # A deadline of gRPC would be that of the whole stream; here each request has its own.
            self._stalled = True
            self._task.cancel()
