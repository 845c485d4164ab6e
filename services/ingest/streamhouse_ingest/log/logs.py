"""All logs the agent holds: by key, by partition, by name; their memory, and the calls that wait for them.

Owns: the held logs, the leading log of each partition, the producers of each partition, the memory limit, the waits for
registration. Does not own: the state of a single log (partition_log.py), the files, the decision to seal or to lead.
Invariants: a partition has at most one leading log. `memory_bytes` is the sum of the costs of all buffers, `open_bytes`
the sum of the sizes of open buffers; `dirty` holds exactly the logs with an open buffer.
"""

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

# Limit of the appends that the trace of a sealed buffer, or of a read of the tail, links to.
LINKS_MAX = 32
# Number of waits for registration at which abandoned waits are removed; then again at twice the remaining number.
_PRUNE_FROM = 64


class HeldLog:
    """A log and the calls that wait for its registration or for a change."""

    def __init__(self, log: PartitionLog) -> None:
        self.log = log
        self.durable_since_ms: int | None = None  # start of the oldest wait of a durable ack for the open buffer
        self.must_seal = False
        self.end_confirmed = False  # the coordinator has confirmed settled_end as the end of the range
        self.producers_reported = False  # the coordinator has reported the partition's producers in this session
        self.traceparents: deque[str] = deque(maxlen=LINKS_MAX)  # appends that are not sealed yet
        self._recent: deque[tuple[int, str]] = deque(maxlen=LINKS_MAX)  # end offset and traceparent of an append
        # A heap by end offset: a registration ends the waits below it without a walk over the others.
        self._durable: list[tuple[int, int, asyncio.Future[NotLeader | None]]] = []
        self._order = itertools.count()  # decides between waits for the same end: futures have no order
        self._changed: dict[asyncio.Future[None], None] = {}
        self._over = ""
        self._prune_at = _PRUNE_FROM

    def note_trace(self, end_offset: int, traceparent: str) -> None:
        """Notes the trace span of an append that ends at `end_offset`."""
        self.traceparents.append(traceparent)
        self._recent.append((end_offset, traceparent))

    def traces_of(self, offset: int, end_offset: int) -> list[str]:
        """Returns the traceparents of the last LINKS_MAX recorded appends that lie in [offset, end_offset)."""
        return [traceparent for end, traceparent in self._recent if offset < end <= end_offset]

    def wait_registered(self, end_offset: int) -> asyncio.Future[NotLeader | None]:
        """Returns a future that is done when everything below `end_offset` is registered: with None, or with NotLeader
        as its result once that cannot happen any more."""
        # NotLeader is a result, not an exception: asyncio would log an exception that no caller retrieves, and the
        # caller may be gone by then.
        future: asyncio.Future[NotLeader | None] = asyncio.get_running_loop().create_future()
        if self.log.registered_end >= end_offset:
            future.set_result(None)
        elif self._over:
            future.set_result(self._failure(self._over))
        else:
            if len(self._durable) >= self._prune_at:  # removes cancelled waits, which would pile up with every retry
                self._durable = [waiting for waiting in self._durable if not waiting[2].done()]
                heapq.heapify(self._durable)
                self._prune_at = max(_PRUNE_FROM, 2 * len(self._durable))
            heapq.heappush(self._durable, (end_offset, next(self._order), future))
        return future

    def release_registered(self) -> None:
        """Ends the waits for everything below `registered_end` with success."""
        while self._durable and self._durable[0][0] <= self.log.registered_end:
            _, _, future = heapq.heappop(self._durable)
            if not future.done():
                future.set_result(None)

    def fail_waiting_beyond(self, end_offset: int, why: str) -> None:
        """Fails the waits for an end beyond `end_offset`, which will never be registered."""
        kept = [waiting for waiting in self._durable if waiting[0] <= end_offset]
        for waiting in self._durable:
            if waiting[0] > end_offset and not waiting[2].done():
                waiting[2].set_result(self._failure(why))
        self._durable = kept
        heapq.heapify(self._durable)

    def end(self, why: str) -> None:
        """Fails all present and future waits for registration: nothing more of the log will be registered."""
        self._over = why
        self.fail_waiting_beyond(self.log.registered_end, why)

    def _failure(self, why: str) -> NotLeader:
        return not_leader(self.log.topic, self.log.key.partition, why, outcome=UNKNOWN)

    @contextlib.contextmanager
    def changed(self) -> Iterator[asyncio.Future[None]]:
        """Yields a future that is done at the next append or change of the log's state. Each wait has its own future,
        because removing a callback from a shared future searches the callbacks of all waits."""
        change: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._changed[change] = None
        try:
            yield change
        finally:
            self._changed.pop(change, None)

    def notify(self) -> None:
        """Wakes all waits of `changed`, each once."""
        changed, self._changed = self._changed, {}
        for change in changed:
            if not change.done():
                change.set_result(None)


class Logs:
    """The held logs. `memory_bytes` counts the batches in memory, the overhead of all batches, and the producer
    snapshots of sealed buffers."""

    def __init__(self, *, memory_bytes_max: int, tail_cache_bytes: int, producers_max: int) -> None:
        self.memory_bytes_max = memory_bytes_max
        self.producer_ids_from = 0  # smaller producer ids were assigned before the metadata was restored
        self._tail_cache_bytes = tail_cache_bytes
        self._producers_max = producers_max
        self._by_key: dict[RangeKey, HeldLog] = {}
        self._by_partition: dict[tuple[bytes, int], list[HeldLog]] = {}
        self._led: dict[tuple[str, int], HeldLog] = {}
        self._producers: dict[tuple[bytes, int], ProducerTable] = {}
        self._tail: deque[tuple[HeldLog, Buffer]] = deque()  # registered buffers, oldest registration first
        self._tail_bytes = 0
        self.dirty: dict[RangeKey, HeldLog] = {}  # logs with an open buffer
        self.open_bytes = 0
        self.memory_bytes = 0
        self._subscribers: list[Callable[[HeldLog], None]] = []

    def __iter__(self) -> Iterator[HeldLog]:
        return iter(list(self._by_key.values()))  # a copy, so that a caller may drop logs meanwhile

    def get(self, key: RangeKey) -> HeldLog | None:
        """Returns the log of the range, None if the agent does not hold it."""
        return self._by_key.get(key)

    def led(self, topic: str, partition: int) -> HeldLog | None:
        """Returns the log that appends to the partition go to, None if the agent does not lead the partition."""
        return self._led.get((topic, partition))

    def of_partition(self, topic_id: bytes, partition: int) -> list[HeldLog]:
        """Returns the held logs of the partition, ascending by epoch and thereby by offset."""
        return self._by_partition.get((topic_id, partition), [])

    def producers(self, partition_key: tuple[bytes, int]) -> ProducerTable:
        """Returns the idempotent producers of the partition, which outlive epochs; creates an empty table if needed."""
        if partition_key not in self._producers:
            self._producers[partition_key] = ProducerTable(self._producers_max)
        return self._producers[partition_key]

    def registered_end(self, key: RangeKey) -> int | None:
        """Returns the offset below which the log is registered, None if the agent does not hold the log."""
        held = self._by_key.get(key)
        return None if held is None else held.log.registered_end

    # ---- membership

    def hold(self, log: PartitionLog) -> HeldLog:
        """Adds a log, counts the memory of its sealed buffers, and returns it. `lead` makes it the leading log."""
        held = HeldLog(log)
        self._by_key[log.key] = held
        siblings = self._by_partition.setdefault(log.key.partition_key, [])
        siblings.append(held)
        siblings.sort(key=lambda other: other.log.key.epoch)
        self.memory_bytes += sum(_cost(buffer) for buffer in log.sealed)
        return held

    def lead(self, held: HeldLog) -> None:
        """Makes this log the leading log: appends to its partition go to it from now on."""
        held.log.leading = True
        self._led[(held.log.topic, held.log.key.partition)] = held

    def stop_leading(self, held: HeldLog) -> None:
        """Stops deciding appends to this log; appends that are being written still count."""
        held.log.leading = False
        name = (held.log.topic, held.log.key.partition)
        # By now a later epoch may lead, or a topic that was created again under the name.
        if self._led.get(name) is held:
            del self._led[name]

    def drop(self, held: HeldLog, why: str) -> None:
        """Drops a log that is not needed any more: finished, lost, or of a deleted topic. Fails its waits."""
        self.stop_leading(held)
        self._forget_open(held)
        log = held.log
        if not any(other.log.leading for other in self._by_partition[log.key.partition_key]):
            # Registered batches return with the grant of the next epoch. If a log leads, that grant has already come,
            # and older ranges ended well: a fenced range ends the session, and with it all leadership.
            log.forget_unregistered()
        buffers = [*log.sealed, *([] if log.open is None else [log.open])]
        self.memory_bytes -= sum(map(_cost, buffers))
        while log.tail:
            self._drop_tail_of(held)
        del self._by_key[log.key]
        siblings = self._by_partition[log.key.partition_key]
        siblings.remove(held)
        if not siblings:
            del self._by_partition[log.key.partition_key]
            # The coordinator reports the producers again with the next grant of the partition.
            self._producers.pop(log.key.partition_key, None)
        held.end(why)
        held.notify()

    # ---- changes of a log

    def subscribe(self, appended: Callable[[HeldLog], None]) -> None:
        """Adds a subscriber of `appended`, which is called between two awaits of the writer and must not raise."""
        self._subscribers.append(appended)

    def appended(self, held: HeldLog) -> None:
        """Notifies the readers that wait at the end of the log, and the subscribers: once per group of writes, not per
        batch."""
        held.notify()
        for subscriber in self._subscribers:
            subscriber(held)

    def count_batch(self, held: HeldLog, size_bytes: int) -> None:
        """Counts a batch of `size_bytes` that was just applied to the open buffer of the log."""
        self.dirty[held.log.key] = held
        self.open_bytes += size_bytes
        self.memory_bytes += size_bytes + BATCH_OVERHEAD_BYTES

    def seal(self, held: HeldLog) -> Buffer | None:
        """Seals the open buffer of the log and returns it, None if no buffer is open. The buffer's producer snapshot
        counts as memory until the buffer is registered."""
        self._forget_open(held)
        buffer = held.log.seal()
        if buffer is not None:
            self.memory_bytes += buffer.snapshot_bytes
        return buffer

    def take_snapshots(self, held: HeldLog) -> None:
        """Sets the producer snapshots of sealed buffers that a replay found."""
        with self._counting_sealed(held.log):
            held.log.take_snapshots()

    def register(self, held: HeldLog, registered_end: int) -> None:
        """Registers the log up to `registered_end`: releases durable acks and moves its buffers to the tail, where
        they stay for readers while memory allows."""
        log = held.log
        if log.open is not None and log.open.base_offset < registered_end:
            self.seal(held)  # records of the open buffer were registered under an earlier announcement
        for buffer in log.register(registered_end):
            self.memory_bytes -= buffer.drop_snapshot()
            self._tail.append((held, buffer))
            self._tail_bytes += _cost(buffer)
            if buffer.memory_bytes < buffer.size_bytes:  # partly on disk only, in files that may be deleted now
                self._empty_tail_to(held, buffer)
        held.release_registered()
        held.notify()
        self.trim()

    def cut_out(self, held: HeldLog, buffer: Buffer, damaged: Collection[WalPosition]) -> list[Buffer]:
        """Removes batches that cannot be read back from a sealed buffer. Returns the remaining buffers."""
        with self._counting_sealed(held.log):
            left = held.log.cut_out(buffer, damaged)
        held.notify()
        return left

    def settle(self, held: HeldLog, end_offset: int) -> int:
        """Settles the range at `end_offset`. Returns the number of records beyond, which are fenced."""
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
        """True if memory exceeds the limit. After trim() that means that even without batches in memory the limit is
        exceeded: too many small batches, or snapshots of too many producers, wait for registration. trim() leaves
        memory that is exactly at the limit, so the limit itself is not full."""
        return self.memory_bytes > self.memory_bytes_max

    def trim(self) -> None:
        """Drops batches from memory until the limits hold: registered batches first, then sealed, then open batches.
        The log on disk has all of them."""
        # Registered batches are in segments by now: dropping them costs the agent nothing, while a sealed batch must be
        # read back from disk for its hand-over.
        while self._tail and (self._tail_bytes > self._tail_cache_bytes or self.memory_bytes > self.memory_bytes_max):
            held, buffer = self._tail[0]
            self._empty_tail_to(held, buffer)
        if self.memory_bytes > self.memory_bytes_max:
            # Frees a tenth more than needed, so that not every append walks over all logs.
            goal = self.memory_bytes_max * 9 // 10
            for buffer in self._droppable():
                self.memory_bytes -= buffer.drop_batches()
                if self.memory_bytes <= goal:
                    break

    def _droppable(self) -> Iterable[Buffer]:
        # Open buffers last: readers at the end of the log ask for the newest batches.
        sealed = [buffer for held in self for buffer in held.log.sealed if buffer.memory_bytes]
        yield from sorted(sealed, key=lambda buffer: buffer.first_append_ms)
        for held in self.dirty.values():
            if held.log.open is not None:
                yield held.log.open

    @contextlib.contextmanager
    def _counting_sealed(self, log: PartitionLog) -> Iterator[None]:
        """Corrects `memory_bytes` by the difference that the block makes to the cost of the sealed buffers."""
        before = sum(map(_cost, log.sealed))
        yield
        self.memory_bytes += sum(map(_cost, log.sealed)) - before

    def _empty_tail_to(self, held: HeldLog, buffer: Buffer) -> None:
        """Drops the log's registered buffers up to and including `buffer`, so that the kept buffers have no gap."""
        dropped = None
        while dropped is not buffer:
            dropped = self._drop_tail_of(held)

    def _drop_tail_of(self, held: HeldLog) -> Buffer:
        buffer = held.log.tail.popleft()
        self._tail.remove((held, buffer))  # not always the first: buffers of other logs may be older
        self._tail_bytes -= _cost(buffer)
        self.memory_bytes -= _cost(buffer)
        return buffer


def _cost(buffer: Buffer) -> int:
    return buffer.memory_bytes + buffer.overhead_bytes + buffer.snapshot_bytes


def not_leader(topic: str, partition: int, why: str, *, outcome: str = NOT_WRITTEN) -> NotLeader:
    """Returns the error for a producer that must look for the leader again. `outcome`: NOT_WRITTEN or UNKNOWN, the fate
    of its batch."""
    return NotLeader(
        f"this agent does not lead {topic}/{partition}: {why}",
        topic=topic,
        partition=partition,
        outcome=outcome,
        retry_after_ms=100,
    )
