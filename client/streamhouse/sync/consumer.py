"""The consumer for plain code."""

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self, Unpack

from shproto.rpc import Interceptors

from streamhouse import consumer
from streamhouse.background import BACKGROUND
from streamhouse.core.lag import Lag
from streamhouse.core.options import ConsumerKwargs, Start
from streamhouse.records import Record, RecordBatch, TopicPartition


class Consumer:
    """Reads records; see `streamhouse.Consumer` for the options and for what is committed when."""

    def __init__(
        self,
        bootstrap: str | Sequence[str],
        topics: Sequence[str] = (),
        *,
        assign: Sequence[tuple[str, int]] = (),
        telemetry: Interceptors | None = None,
        **options: Unpack[ConsumerKwargs],
    ) -> None:
        self._inner = consumer.Consumer(bootstrap, topics, assign=assign, telemetry=telemetry, **options)

    def __enter__(self) -> Self:
        BACKGROUND.run(self._inner.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        BACKGROUND.run(self._inner.close(done_with_last=kind is None))

    def __iter__(self) -> Self:
        self._inner.__aiter__()
        return self

    def __next__(self) -> Record:
        while True:
            for record in self._inner._iteration.records:
                return record
            if not BACKGROUND.run(self._inner._advance()):
                raise StopIteration

    def batches(self) -> Iterator[RecordBatch]:
        """Records as columns, a `RecordBatch` of one partition at a time."""
        self._inner.__aiter__()
        while (batch := self._inner._iteration.rest()) is not None or BACKGROUND.run(self._inner._advance()):
            if batch is not None:
                yield batch

    def commit(self, offsets: Mapping[tuple[str, int], int] | None = None) -> None:
        """Stores where the group goes on: everything handed over so far, or the `offsets` given."""
        BACKGROUND.run(self._inner.commit(offsets))

    def seek(self, topic: str, partition: int, offset: Start) -> None:
        """Goes on at `offset` (or at an end, or a time)."""
        BACKGROUND.run(self._inner.seek(topic, partition, offset))

    def lag(self) -> dict[TopicPartition, Lag]:
        """Records still to be handed over, per partition."""
        return BACKGROUND.run(self._inner.lag())

    def positions(self) -> dict[TopicPartition, int]:
        """The next offset that will be handed over, per partition."""
        return self._inner.positions()

    @property
    def assignment(self) -> frozenset[TopicPartition]:
        """The partitions being read."""
        return self._inner.assignment

    @property
    def waiting(self) -> Mapping[TopicPartition, str]:
        """Why partitions that cannot be read on at the moment wait."""
        return dict(self._inner.waiting)  # as it is now: the other thread goes on changing it

    def close(self) -> None:
        """Commits (with auto_commit), leaves the group, closes the connections."""
        BACKGROUND.run(self._inner.close())
