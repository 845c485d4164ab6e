"""The lag of consumer groups, for the metrics.

Owns: the lags of the latest look. Does not own: the index, committed offsets. Invariants: at most `series_max` pairs of
group and topic are shown, those furthest behind; `left_out` counts the others. A failed look leaves the earlier
result.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from opentelemetry.metrics import CallbackOptions, Observation
from shcluster.live_index import LiveIndex
from shproto.errors import StreamHouseError, UnknownGroup
from shproto.keys import PartitionKey
from shproto.services import CoordinatorApi
from shproto.v1 import coordinator_pb2
from shruntime.clock import Clock

from shread.core.lag import GroupLag, lag_of
from shread.core.watermarks import Watermarks
from shread.counters import meter

log = logging.getLogger(__name__)

GroupTopic = tuple[str, str]
"""(group, topic)."""


class GroupLags:
    """`run` looks every `interval_ms`, `export` publishes the result."""

    def __init__(
        self,
        coordinator: CoordinatorApi,
        index: LiveIndex,
        watermarks: Watermarks,
        clock: Clock,
        *,
        interval_ms: int,
        series_max: int,
    ) -> None:
        self._coordinator = coordinator
        self._index = index
        self._watermarks = watermarks
        self._clock = clock
        self._interval_ms = interval_ms
        self._series_max = series_max
        self.lags: dict[GroupTopic, GroupLag] = {}
        self.left_out = 0

    def export(self) -> None:
        """Registers the gauges."""
        meter.create_observable_gauge(
            "streamhouse_query_group_lag_records",
            [self._observe_records],
            description="records that a consumer group has still to read, by group and topic",
        )
        meter.create_observable_gauge(
            "streamhouse_query_group_lag_seconds",
            [self._observe_seconds],
            description="age of the oldest record that a consumer group has still to read, by group and topic",
        )
        meter.create_observable_gauge(
            "streamhouse_query_group_lag_left_out",
            [lambda _: [Observation(self.left_out)]],
            description="pairs of group and topic that are not shown, as others are further behind",
        )

    async def run(self) -> None:
        """Looks in a loop until cancelled; the next look repeats a failed one."""
        while True:
            try:
                await self.look()
            except StreamHouseError as error:
                log.debug("the lag of groups is not known: %s", error)
            await self._clock.sleep_ms(self._interval_ms)

    async def look(self) -> None:
        """Asks for the committed offsets of every group in turn. Raises StreamHouseError."""
        found: dict[GroupTopic, GroupLag] = {}
        response = await self._coordinator.list_groups(coordinator_pb2.ListGroupsRequest())
        for summary in response.groups:
            if summary.committed_partitions:
                found |= await self._lags_of(summary.group)
        furthest = sorted(found, key=lambda pair: (-found[pair].behind_ms, -found[pair].records, pair))
        self.lags = {pair: found[pair] for pair in furthest[: self._series_max]}
        self.left_out = len(found) - len(self.lags)

    async def _lags_of(self, group: str) -> dict[GroupTopic, GroupLag]:
        try:
            response = await self._coordinator.fetch_offsets(coordinator_pb2.FetchOffsetsRequest(group=group))
        except UnknownGroup:  # deleted meanwhile
            return {}
        now_ms = self._clock.wall_ms()
        lags: dict[GroupTopic, GroupLag] = {}
        for item in response.offsets:
            partition = self._index.cluster.partitions.get(PartitionKey(item.topic_id, item.partition))
            if item.offset < 0 or partition is None:  # nothing committed, or of a topic that is gone
                continue
            lag = lag_of(partition, item.offset, self._watermarks.of(partition), now_ms)
            pair = group, item.topic
            lags[pair] = lags.get(pair, GroupLag(0, 0)) + lag
        return lags

    def _observe_records(self, _: CallbackOptions) -> Iterable[Observation]:
        return [Observation(lag.records, _labels(pair)) for pair, lag in self.lags.items()]

    def _observe_seconds(self, _: CallbackOptions) -> Iterable[Observation]:
        return [Observation(lag.behind_ms / 1000, _labels(pair)) for pair, lag in self.lags.items()]


def _labels(pair: GroupTopic) -> dict[str, str]:
    return {"group": pair[0], "topic": pair[1]}
