"""All logs the agent holds: by key, by partition, by name; their memory, and who waits for them."""

import asyncio
import contextlib
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator

from shproto.errors import NOT_WRITTEN, UNKNOWN, NotLeader
from shproto.keys import RangeKey

from streamhouse_ingest.log.buffer import BATCH_OVERHEAD_BYTES, Buffer, WalPosition
from streamhouse_ingest.log.partition_log import PartitionLog
from streamhouse_ingest.log.producers import ProducerTable

# Of the appends in one sealed buffer, or read of the tail, so many are linked to its trace.
LINKS_MAX = 32
# Waits for registration are looked through for abandoned ones when there are so many, then at twice what was left.
_PRUNE_FROM = 64


class HeldLog:
    """A log and the calls that wait on it."""

    def __init__(self, log: PartitionLog) -> None:
        self.log = log
        self.durable_since_ms: int | None = None  # a durable ack waits for the open buffer since
        self.must_seal = False
        self.end_confirmed = False  # the coordinator has said that the range ends where this log is settled
        self.told = False  # in this session, what the coordinator knows of the partition's producers
        self.traceparents: deque[str] = deque(maxlen=LINKS_MAX)  # of appends that are not sealed yet
        self._recent: deque[tuple[int, str]] = deque(maxlen=LINKS_MAX)  # where an append ends, and its traceparent
        self._durable: list[tuple[int, int, asyncio.Future[NotLeader | None]]] = []
        self._order = itertools.count()
        self._changed: dict[asyncio.Future[None], None] = {}
        self._over = ""
        self._prune_at = _PRUNE_FROM

    def note_trace(self, end_offset: int, traceparent: str) -> None:
        """Takes note of the span of an append that ends at `end_offset`."""
        self.traceparents.append(traceparent)
        self._recent.append((end_offset, traceparent))

    def traces_of(self, offset: int, end_offset: int) -> list[str]:
        """Returns the traceparents of the last LINKS_MAX recorded appends that lie in [offset, end_offset)."""
        return [traceparent for end, traceparent in self._recent if offset < end <= end_offset]

    def wait_registered(self, end_offset: int) -> asyncio.Future[NotLeader | None]:
        """Done when everything below `end_offset` is registered, or with an error when that cannot happen any more."""
        future: asyncio.Future[NotLeader | None] = asyncio.get_running_loop().create_future()
        if self.log.registered_end >= end_offset:
            future.set_result(None)
        elif self._over:
            future.set_result(self._failure(self._over))
        else:
            if len(self._durable) >= self._prune_at:  # those who gave up waiting: retries would pile up
                self._durable = [waiting for waiting in self._durable if not waiting[2].done()]
                heapq.heapify(self._durable)
                self._prune_at = max(_PRUNE_FROM, 2 * len(self._durable))
            heapq.heappush(self._durable, (end_offset, next(self._order), future))
        return future

    def release_registered(self) -> None:
        while self._durable and self._durable[0][0] <= self.log.registered_end:
            _, _, future = heapq.heappop(self._durable)
            if not future.done():
                future.set_result(None)

    def fail_waiting_beyond(self, end_offset: int, why: str) -> None:
        """Records at or beyond `end_offset` will never be registered."""
        kept = [waiting for waiting in self._durable if waiting[0] <= end_offset]
        for waiting in self._durable:
            if waiting[0] > end_offset and not waiting[2].done():
                waiting[2].set_result(self._failure(why))
        self._durable = kept
        heapq.heapify(self._durable)

    def end(self, why: str) -> None:
        """Nothing more of the log will be registered: whoever waits, or comes to wait, hears of it."""
        self._over = why
        self.fail_waiting_beyond(self.log.registered_end, why)

    def _failure(self, why: str) -> NotLeader:
        return not_leader(self.log.topic, self.log.key.partition, why, outcome=UNKNOWN)

    @contextlib.contextmanager
    def changed(self) -> Iterator[asyncio.Future[None]]:
        """Yields a future that is done at the next append or change of the log's state. Each wait has one of its own:
        taking a callback off a shared one looks through those of all others."""
        change: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._changed[change] = None
        try:
            yield change
        finally:
            self._changed.pop(change, None)

    def notify(self) -> None:
        changed, self._changed = self._changed, {}
        for change in changed:
            if not change.done():
                change.set_result(None)


class Logs:
    """Owns the held logs. What it counts: `memory_bytes` (batches in memory, what all batches cost besides, and what
    sealed buffers say of their producers)."""

    def __init__(self, *, memory_bytes_max: int, tail_cache_bytes: int, producers_max: int) -> None:
        self.memory_bytes_max = memory_bytes_max
        self.producer_ids_from = 0  # smaller ones were given out before the metadata was restored
        self._tail_cache_bytes = tail_cache_bytes
        self._producers_max = producers_max
        self._by_key: dict[RangeKey, HeldLog] = {}
        self._by_partition: dict[tuple[bytes, int], list[HeldLog]] = {}
        self._led: dict[tuple[str, int], HeldLog] = {}
        self._producers: dict[tuple[bytes, int], ProducerTable] = {}
        self._tail: deque[tuple[HeldLog, Buffer]] = deque()  # registered, oldest first
        self._tail_bytes = 0
        self.dirty: dict[RangeKey, HeldLog] = {}  # those with an open buffer
        self.open_bytes = 0
        self.memory_bytes = 0
        self._subscribers: list[Callable[[HeldLog], None]] = []

    def __iter__(self) -> Iterator[HeldLog]:
        return iter(list(self._by_key.values()))

    def get(self, key: RangeKey) -> HeldLog | None:
        return self._by_key.get(key)

    def led(self, topic: str, partition: int) -> HeldLog | None:
        """The log that appends to the partition go to."""
        return self._led.get((topic, partition))

    def of_partition(self, topic_id: bytes, partition: int) -> list[HeldLog]:
        """Ascending by epoch, so also by offset."""
        return self._by_partition.get((topic_id, partition), [])

    def producers(self, partition_key: tuple[bytes, int]) -> ProducerTable:
        """The partition's idempotent producers; they outlive epochs."""
        if partition_key not in self._producers:
            self._producers[partition_key] = ProducerTable(self._producers_max)
        return self._producers[partition_key]

    def registered_end(self, key: RangeKey) -> int | None:
        held = self._by_key.get(key)
        return None if held is None else held.log.registered_end

    # ---- membership

    def hold(self, log: PartitionLog) -> HeldLog:
        held = HeldLog(log)
        self._by_key[log.key] = held
        siblings = self._by_partition.setdefault(log.key.partition_key, [])
        siblings.append(held)
        siblings.sort(key=lambda other: other.log.key.epoch)
        self.memory_bytes += sum(_cost(buffer) for buffer in log.sealed)
        return held

    def lead(self, held: HeldLog) -> None:
        """Appends go here from now on."""
        held.log.leading = True
        self._led[(held.log.topic, held.log.key.partition)] = held

    def stop_leading(self, held: HeldLog) -> None:
        """No append is decided from now on; one that is being written still counts."""
        held.log.leading = False
        name = (held.log.topic, held.log.key.partition)
        if self._led.get(name) is held:
            del self._led[name]

    def drop(self, held: HeldLog, why: str) -> None:
        """The log is not needed any more: finished, lost, or its topic is gone."""
        self.stop_leading(held)
        self._forget_open(held)
        log = held.log
        if not any(other.log.leading for other in self._by_partition[log.key.partition_key]):
            # What was registered comes back with the next epoch's grant. A leader has had its grant, and knows only
            # ranges that ended well: a fenced one ends the session, and with it all leadership.
            log.give_up()
        buffers = [*log.sealed, *([] if log.open is None else [log.open])]
        self.memory_bytes -= sum(map(_cost, buffers))
        while log.tail:
            self._drop_tail_of(held)
        del self._by_key[log.key]
        siblings = self._by_partition[log.key.partition_key]
        siblings.remove(held)
        if not siblings:
            del self._by_partition[log.key.partition_key]
            self._producers.pop(log.key.partition_key, None)
        held.end(why)
        held.notify()

    # ---- what happens to one

    def subscribe(self, appended: Callable[[HeldLog], None]) -> None:
        """Adds a subscriber of `appended`. It is called between two awaits of the writer, and must not raise."""
        self._subscribers.append(appended)

    def appended(self, held: HeldLog) -> None:
        """Tells the readers that wait at the log's end, and the subscribers, of what a group of writes brought to this
        log: once, however many batches that was."""
        held.notify()
        for subscriber in self._subscribers:
            subscriber(held)

    def count_batch(self, held: HeldLog, size_bytes: int) -> None:
        """Counts a batch of this size, just applied to the log's open buffer."""
        self.dirty[held.log.key] = held
        self.open_bytes += size_bytes
        self.memory_bytes += size_bytes + BATCH_OVERHEAD_BYTES

    def seal(self, held: HeldLog) -> Buffer | None:
        self._forget_open(held)
        buffer = held.log.seal()
        if buffer is not None:
            self.memory_bytes += buffer.snapshot_bytes
        return buffer

    def take_snapshots(self, held: HeldLog) -> None:
        """Gives sealed buffers of a replay what they say of their producers."""
        with self._counting_sealed(held.log):
            held.log.take_snapshots()

    def register(self, held: HeldLog, registered_end: int) -> None:
        """Releases the durable acks below `registered_end`, and the memory as far as it is not kept for readers."""
        log = held.log
        if log.open is not None and log.open.base_offset < registered_end:
            self.seal(held)  # somebody registered from it under an older announcement
        for buffer in log.register(registered_end):
            self.memory_bytes -= buffer.drop_snapshot()
            self._tail.append((held, buffer))
            self._tail_bytes += _cost(buffer)
            if buffer.memory_bytes < buffer.size_bytes:  # partly on disk only, in files that may go now
                self._empty_tail_to(held, buffer)
        held.release_registered()
        held.notify()
        self.trim()

    def cut_out(self, held: HeldLog, buffer: Buffer, damaged: Collection[WalPosition]) -> list[Buffer]:
        """Batches of a sealed buffer cannot be read back any more. Returns the buffers that are left of it."""
        with self._counting_sealed(held.log):
            left = held.log.cut_out(buffer, damaged)
        held.notify()
        return left

    def settle(self, held: HeldLog, end_offset: int) -> int:
        """The range ends at `end_offset`. Returns how many records of ours lie beyond and are given up."""
        self.stop_leading(held)
        self.seal(held)
        with self._counting_sealed(held.log):
            fenced = held.log.settle(end_offset)
        held.fail_waiting_beyond(max(end_offset, held.log.registered_end), "the range was settled below the record")
        held.notify()
        return sum(buffer.record_count for buffer in fenced)

    def _forget_open(self, held: HeldLog) -> None:
        if self.dirty.pop(held.log.key, None) is not None and held.log.open is not None:
            self.open_bytes -= held.log.open.size_bytes
        held.durable_since_ms = None
        held.must_seal = False

    # ---- memory

    @property
    def memory_full(self) -> bool:
        """Even without any batch in memory there is more than the limit: too many small batches wait for registration,
        or buffers of too many producers. What is just within the limit trim() leaves, so that is not full."""
        return self.memory_bytes > self.memory_bytes_max

    def trim(self) -> None:
        """Keeps within the limits: registered batches go first, then sealed ones, then open ones (the log has them)."""
        while self._tail and (self._tail_bytes > self._tail_cache_bytes or self.memory_bytes > self.memory_bytes_max):
            held, buffer = self._tail[0]
            self._empty_tail_to(held, buffer)
        if self.memory_bytes > self.memory_bytes_max:
            # A tenth more than needed, so that this walk over all logs is not done for every append.
            goal = self.memory_bytes_max * 9 // 10
            for buffer in self._droppable():
                self.memory_bytes -= buffer.drop_batches()
                if self.memory_bytes <= goal:
                    break

    def _droppable(self) -> Iterable[Buffer]:
        sealed = [buffer for held in self for buffer in held.log.sealed if buffer.memory_bytes]
        yield from sorted(sealed, key=lambda buffer: buffer.first_append_ms)
        for held in self.dirty.values():
            if held.log.open is not None:
                yield held.log.open

    @contextlib.contextmanager
    def _counting_sealed(self, log: PartitionLog) -> Iterator[None]:
        """What is done changes which buffers are sealed, or what they cost."""
        before = sum(map(_cost, log.sealed))
        yield
        self.memory_bytes += sum(map(_cost, log.sealed)) - before

    def _empty_tail_to(self, held: HeldLog, buffer: Buffer) -> None:
        """Gives up the log's registered buffers up to `buffer`: what is kept has no gap."""
        dropped = None
        while dropped is not buffer:
            dropped = self._drop_tail_of(held)

    def _drop_tail_of(self, held: HeldLog) -> Buffer:
        buffer = held.log.tail.popleft()
        self._tail.remove((held, buffer))
        self._tail_bytes -= _cost(buffer)
        self.memory_bytes -= _cost(buffer)
        return buffer


def _cost(buffer: Buffer) -> int:
    return buffer.memory_bytes + buffer.overhead_bytes + buffer.snapshot_bytes


def not_leader(topic: str, partition: int, why: str, *, outcome: str = NOT_WRITTEN) -> NotLeader:
    """The answer to a producer that has to look for the leader again. `outcome`: what became of its batch."""
    return NotLeader(
        f"this agent does not lead {topic}/{partition}: {why}",
        topic=topic,
        partition=partition,
        outcome=outcome,
        retry_after_ms=100,
    )
