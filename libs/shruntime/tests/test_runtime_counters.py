import asyncio
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from shruntime.clock import ManualClock
from shruntime.counters import OTHER_TOPICS, TopicCounter
from shruntime.disk_space import LOOK_EVERY_MS, DiskSpace
from shruntime.tasks import Tasks

pytestmark = pytest.mark.quick


def shown(reader: InMemoryMetricReader) -> dict[str, int]:
    data: Any = reader.get_metrics_data()
    [metric] = data.resource_metrics[0].scope_metrics[0].metrics
    return {point.attributes["topic"]: point.value for point in metric.data.data_points}


def test_topics_beyond_the_limit_count_together() -> None:
    reader = InMemoryMetricReader()
    counter = TopicCounter(MeterProvider([reader]).get_meter("test"), "records_total", "records", topics_max=2)
    assert shown(reader) == {OTHER_TOPICS: 0}
    for topic, amount in (("a", 1), ("b", 2), ("c", 4), ("a", 8), ("d", 16)):
        counter.add(topic, amount)
    assert shown(reader) == {"a": 9, "b": 2, OTHER_TOPICS: 20}


def test_no_topic_has_metrics_of_its_own_with_a_limit_of_0() -> None:
    reader = InMemoryMetricReader()
    counter = TopicCounter(MeterProvider([reader]).get_meter("test"), "records_total", "records", topics_max=0)
    counter.add("a", 3)
    assert shown(reader) == {OTHER_TOPICS: 3}


async def test_the_space_of_a_disk_is_known_again_once_its_directory_is_there(tmp_path: Path) -> None:
    clock, tasks = _CountingClock(), Tasks()
    space = DiskSpace(tmp_path / "log", clock)
    assert space.free_bytes is None
    tasks.spawn("space", space.run())
    await clock.slept(1)
    assert space.free_bytes is None
    (tmp_path / "log").mkdir()
    clock.advance(LOOK_EVERY_MS)
    await clock.slept(2)
    assert space.free_bytes is not None and space.free_bytes > 0
    await tasks.stop()


class _CountingClock(ManualClock):
    """Tells how often somebody began to sleep."""

    def __init__(self) -> None:
        super().__init__()
        self._count = asyncio.Semaphore(0)
        self._seen = 0

    async def sleep_ms(self, duration_ms: float) -> None:
        self._count.release()
        await super().sleep_ms(duration_ms)

    async def slept(self, times: int) -> None:
        """Returns once that has happened so many times in all."""
        while self._seen < times:
            await self._count.acquire()
            self._seen += 1
