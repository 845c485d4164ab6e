"""The agents a producer writes to, by address: the stream to each, who waits for room on it, when to try it again.

Owns: streams and their back-offs. Does not own: which partition an agent leads, what is sent, retries of batches.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from shcluster.peers import Peers
from shproto.errors import StreamHouseError
from shproto.v1 import ingest_pb2
from shruntime.tasks import Backoff, Tasks

from streamhouse.batches import Batch
from streamhouse.core.options import ProducerOptions
from streamhouse.core.sequences import Outgoing
from streamhouse.gatherer import LaneState, Stream, new_backoff
from streamhouse.leader_stream import LeaderStream

# The leader answers within request_timeout_ms; the answer needs time to travel and wait for those before it.
ANSWER_GRACE_MS = 5_000

Sent = tuple[LaneState, Outgoing[Batch]]


@dataclass(slots=True, eq=False)
class Leader:
    """One address: its stream, who waits for room on it, and when it may be tried again."""

    address: str
    backoff: Backoff
    stream: Stream | None = None
    waiting: deque[LaneState] = field(default_factory=deque)
    retry_at_ms: float = -math.inf
    warned: bool = False  # that it cannot be reached; once, until it answers again

    def wait_ms(self, now_ms: float) -> float:
        """How long not to open a stream yet; nothing to wait for while one is open."""
        return 0 if self.stream is not None else max(0, self.retry_at_ms - now_ms)

    def answered(self) -> None:
        """It can be reached: the next failure is a first one again."""
        self.backoff.reset()
        self.warned = False

    def broke(self, now_ms: float) -> None:
        """Its stream ended."""
        self.stream = None
        self.retry_at_ms = now_ms + self.backoff.next_ms()

    def wait_for_room(self, state: LaneState) -> None:
        """Puts the lane behind those that wait already."""
        if not state.queued:
            state.queued = True
            self.waiting.append(state)

    def pump_waiting(self, pump: Callable[[LaneState], None]) -> None:
        """Those that found no room go first, each in its turn."""
        for _ in range(len(self.waiting)):
            if self.stream is not None and not self.stream.has_room:
                return
            state = self.waiting.popleft()
            state.queued = False
            pump(state)


class Leaders:
    """`answered` and `broken` as in `LeaderStream`. Streams run as `tasks` of the owner."""

    def __init__(
        self,
        options: ProducerOptions,
        peers: Peers,
        tasks: Tasks,
        answered: Callable[[Stream, Sent, ingest_pb2.ProduceResponse], None],
        broken: Callable[[Stream, list[Sent], list[Sent], StreamHouseError], None],
    ) -> None:
        self._options = options
        self._peers = peers
        self._tasks = tasks
        self._answered = answered
        self._broken = broken
        self._by_address: dict[str, Leader] = {}

    def at(self, address: str) -> Leader:
        """The leader there, made at first sight."""
        leader = self._by_address.get(address)
        if leader is None:
            leader = self._by_address[address] = Leader(address, new_backoff(self._options))
        return leader

    def open_stream(self, leader: Leader) -> Stream:
        """The stream to it, begun if there is none."""
        if leader.stream is None:
            leader.stream = LeaderStream(
                leader.address,
                self._peers.ingest(leader.address),
                self._peers.connect,
                self._options.max_in_flight,
                self._options.request_timeout_ms + ANSWER_GRACE_MS,
                self._answered,
                self._broken,
            )
            self._tasks.spawn(f"produce to {leader.address}", leader.stream.run())
        return leader.stream
