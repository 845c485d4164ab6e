"""Queues by key, taken from by turns.

Owns: the items of each key in order, and the turns of the keys. Invariants: items of a key leave in the order in which
they came; a key that has just had its turn has the next after every other key that has items.
"""

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class RoundRobinQueue(Generic[K, T]):
    """Truthy while any key has an item."""

    def __init__(self) -> None:
        # In the order of the turns. A key without items is absent: an empty queue would cost a look at every turn.
        self._queues: OrderedDict[K, deque[T]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._queues)

    def __iter__(self) -> Iterator[T]:
        """Yields all items, key by key."""
        for queue in self._queues.values():
            yield from queue

    def put(self, key: K, item: T) -> None:
        """Adds `item` behind those of its key; a key without items gets the last turn."""
        self._queues.setdefault(key, deque()).append(item)

    def put_back(self, key: K, item: T) -> None:
        """Adds `item` before those of its key, as after a `take` that used only part of it; the key's turn stays."""
        self._queues.setdefault(key, deque()).appendleft(item)

    def take(self) -> tuple[K, T]:
        """Removes and returns the key whose turn it is and its first item. Raises LookupError without items."""
        if not self._queues:
            raise LookupError("no key has an item")
        key, queue = self._queues.popitem(last=False)
        item = queue.popleft()
        if queue:
            self._queues[key] = queue
        return key, item

    def of(self, key: K) -> Iterator[T]:
        """Yields the items of the key."""
        yield from self._queues.get(key, ())

    def drop(self, key: K) -> list[T]:
        """Removes and returns all items of the key."""
        return list(self._queues.pop(key, ()))
