"""The index together with the readers that wait for it to change.

Owns: the cluster's index, the watches of readers, the missing event's position. Does not own: the feed that changes the
index (follower.py).
Invariants: one task changes the index. Readers are woken in the order in which they came. A reader that arms its watch
before it looks misses no change. After close() nothing waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from shproto.errors import ShuttingDown, Unavailable, UnknownPartition, UnknownTopic
from shproto.events import Event
from shproto.keys import PartitionKey

from shcluster.index import ClusterIndex, PartitionIndex, SqlTable, TopicEntry

# Registrations that were recorded in a trace, 200 bytes each: hours of them at the usual sampling.
TRACES_MAX = 10_000


class Watch:
    """A reader's wait for changes of a partition. A reader that arms the watch before looking misses no change."""

    def __init__(self) -> None:
        self.changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def arm(self) -> None:
        """Makes `changed` stand for the next change from here on."""
        if self.changed.done():
            self.changed = asyncio.get_running_loop().create_future()

    def fire(self) -> None:
        """Notes a change."""
        if not self.changed.done():
            self.changed.set_result(None)


class LiveIndex:
    """An index that a single task, the follower, changes, and any number of readers watch, all in the same event
    loop."""

    def __init__(self) -> None:
        self.cluster = ClusterIndex()
        self._loaded = False
        self._closed = False
        # Dictionaries, not sets: readers are woken in the order in which they came, so that a simulation repeats
        # itself.
        self._watches: dict[PartitionKey, dict[Watch, None]] = {}
        self._awaited: dict[asyncio.Future[None], int] = {}  # the event's position that each waits for
        self._traces: dict[str, str] = {}  # traceparent of the registration, by segment id; the oldest first

    def find(self, topic: str, partition: int) -> PartitionIndex:
        """Returns the partition by its topic's name. Raises UnknownTopic, UnknownPartition; Unavailable before the
        first snapshot, ShuttingDown after `close`."""
        self._must_be_open()
        entry = self.cluster.topics.get(topic)
        if entry is None:
            raise UnknownTopic(f"there is no topic {topic!r}", topic=topic)
        found = self.cluster.partitions.get(PartitionKey(entry.topic_id, partition))
        if found is None:
            raise UnknownPartition(
                f"topic {topic!r} has partitions 0 to {entry.partitions - 1}, not {partition}",
                topic=topic,
                partition=partition,
                partitions=entry.partitions,
            )
        return found

    def topics(self) -> Mapping[str, TopicEntry]:
        """Returns all topics by name, as of now. Raises Unavailable before the first snapshot, ShuttingDown after
        `close`."""
        self._must_be_open()
        return self.cluster.topics

    def sql_tables(self) -> Mapping[str, SqlTable]:
        """Returns all tables declared for SQL by name in small letters, as of now. Raises as `topics` does."""
        self._must_be_open()
        return self.cluster.sql_tables

    def get(self, key: PartitionKey, topic: str) -> PartitionIndex:
        """Returns the partition as of now. Raises UnknownTopic once the topic was deleted, ShuttingDown after
        `close`."""
        self._must_be_open()
        found = self.cluster.partitions.get(key)
        if found is None:
            raise UnknownTopic(f"topic {topic!r} was deleted", topic=topic)
        return found

    async def reaches(self, position: int, wait_ms: float) -> bool:
        """Returns True once the index is as of the event at `position` or later, False if that takes more than
        `wait_ms`. Raises ShuttingDown after `close`."""
        if self.cluster.position < position and not self._closed:
            reached: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._awaited[reached] = position
            try:
                await asyncio.wait((reached,), timeout=wait_ms / 1000)
            finally:
                del self._awaited[reached]
        self._must_be_open()
        return self.cluster.position >= position

    def apply(self, position: int, event: Event | None) -> None:
        """Applies an event, and wakes the readers that it concerns. Raises IndexMismatch, after which the index may be
        half changed: only `replace` helps."""
        self._wake(self.cluster.apply(position, event))

    def note_trace(self, segment_ids: Iterable[str], traceparent: str) -> None:
        """Remembers the span that registered segments, so that reads soon after can link to the span."""
        for segment_id in segment_ids:
            self._traces[segment_id] = traceparent
        while len(self._traces) > TRACES_MAX:
            del self._traces[next(iter(self._traces))]

    def traces_of(self, segment_id: str) -> Sequence[str]:
        """Returns the traceparent of the span that registered the segment, if it was recorded and is remembered."""
        found = self._traces.get(segment_id)
        return () if found is None else (found,)

    def replace(self, cluster: ClusterIndex) -> None:
        """Puts a new snapshot in place of the index, and wakes all readers."""
        # A snapshot says what the metadata holds, not what is missing from it: only the follower knows.
        cluster.missing_position = self.cluster.missing_position
        self.cluster = cluster
        self._loaded = True
        self._wake(None)

    def miss(self, position: int) -> None:
        """Notes that the event at `position` is gone from the metadata (0: none is missing), and wakes all readers: an
        end that they know is certain no more, or is certain again."""
        if self.cluster.missing_position != position:
            self.cluster.missing_position = position
            self._wake(None)

    def close(self) -> None:
        """Ends all waits: readers that look again get ShuttingDown."""
        self._closed = True
        self._wake(None)

    def _must_be_open(self) -> None:
        if self._closed:
            raise ShuttingDown("this service is stopping; ask another one")
        if not self._loaded:
            raise Unavailable("this service has not loaded its index yet")

    @contextmanager
    def watch(self, key: PartitionKey) -> Iterator[Watch]:
        """Yields a watch of a partition that lasts as long as the body."""
        watch = Watch()
        watches = self._watches.setdefault(key, {})
        watches[watch] = None
        try:
            yield watch
        finally:
            del watches[watch]
            if not watches and self._watches.get(key) is watches:
                del self._watches[key]

    def _wake(self, keys: Iterable[PartitionKey] | None) -> None:
        for reached, position in self._awaited.items():
            if (self._closed or self.cluster.position >= position) and not reached.done():
                reached.set_result(None)
        for key in list(self._watches) if keys is None else keys:
            for watch in self._watches.get(key, ()):
                watch.fire()
