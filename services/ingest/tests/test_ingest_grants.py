"""Keeping up with the grants: what is asked for, and that nothing is missed by asking for little."""

from pathlib import Path

import pytest
from shformat import Records, encode_batch
from shproto.errors import Unavailable
from shproto.keys import RangeKey
from shproto.v1 import coordinator_pb2 as pb
from shproto.v1 import ingest_pb2
from streamhouse_ingest.leadership.pending_grants import RANGES_ASKED_MAX, PendingGrants
from streamhouse_ingest.log.producers import ProducerState, WrittenBatch, encode_snapshot
from streamhouse_ingest.wiring import IngestService

from services.ingest.tests.ingest_agents import eventually, kill, started
from services.ingest.tests.ingest_world import World, segmenting

ALL: dict[RangeKey, int] = {}


def key(partition: int) -> RangeKey:
    return RangeKey(b"t" * 16, partition, 1)


def known_as_of(version: int) -> PendingGrants:
    wanted = PendingGrants()
    wanted.begin()
    assert wanted.take() == ALL
    wanted.answered(ALL, version)
    return wanted


def test_a_session_begins_by_asking_for_all() -> None:
    wanted = known_as_of(7)
    assert wanted.take() is None
    wanted.begin()
    assert wanted.take() == ALL


def test_events_are_asked_about_together_and_once() -> None:
    wanted = known_as_of(7)
    wanted.changed([key(0)], 8)
    wanted.changed([key(1), key(0)], 9)
    assert wanted.take() == {key(0): 9, key(1): 9}
    assert wanted.take() is None


def test_what_changes_while_a_question_is_under_way_is_asked_about_again() -> None:
    wanted = known_as_of(7)
    wanted.changed([key(0)], 8)
    question = wanted.take()
    assert question is not None
    wanted.changed([key(0)], 9)
    wanted.answered(question, 8)
    assert wanted.take() == {key(0): 9}


def test_an_answer_about_all_covers_the_events_before_it() -> None:
    wanted = PendingGrants()
    wanted.begin()
    assert wanted.take() == ALL
    wanted.changed([key(0)], 8)  # the feed is behind the answer that is under way
    wanted.changed([key(1)], 12)
    wanted.answered(ALL, 10)
    wanted.changed([key(2)], 9)
    assert wanted.take() == {key(1): 12}


def test_a_new_session_knows_nothing_of_the_last_one() -> None:
    """After a restore positions begin lower again."""
    wanted = known_as_of(1_000)
    wanted.begin()
    assert wanted.take() == ALL
    wanted.answered(ALL, 3)
    wanted.changed([key(0)], 4)
    assert wanted.take() == {key(0): 4}


@pytest.mark.parametrize(
    ("version", "seen_position", "asks"),
    [(7, 5, False), (9, 9, False), (9, 12, False), (9, 8, True)],
    ids=["known", "seen", "seen long ago", "not seen yet"],
)
def test_a_heartbeat_asks_for_what_the_events_have_not_brought(version: int, seen_position: int, asks: bool) -> None:
    wanted = known_as_of(7)
    wanted.check_version(version, seen_position)
    assert wanted.take() == (ALL if asks else None)


def test_a_question_without_an_answer_is_asked_again() -> None:
    wanted = known_as_of(7)
    wanted.changed([key(0)], 8)
    question = wanted.take()
    assert question is not None
    wanted.changed([key(1)], 9)
    wanted.put_back(question)
    assert wanted.take() == {key(0): 8, key(1): 9}
    wanted.put_back(ALL)
    assert wanted.take() == ALL


def test_more_than_a_question_may_name_is_asking_for_all() -> None:
    wanted = known_as_of(7)
    wanted.changed(map(key, range(RANGES_ASKED_MAX)), 8)
    wanted.request([key(RANGES_ASKED_MAX)])
    assert wanted.take() == ALL


def test_what_did_not_fit_into_an_answer_is_asked_for_again_whatever_the_events_say() -> None:
    wanted = PendingGrants()
    wanted.begin()
    assert wanted.take() == ALL
    wanted.answered(ALL, 10, [key(0), key(1), key(2)])
    wanted.changed([key(1), key(5)], 9)
    assert set(wanted.take() or ()) == {key(0), key(1), key(2)}, "known as of 10, but for these"
    wanted.changed([key(5)], 11)
    question = {key(0): 0, key(1): 0, key(2): 0}
    wanted.put_back(question)
    assert set(wanted.take() or ()) == {key(0), key(1), key(2), key(5)}
    wanted.answered({**question, key(5): 11}, 12, [key(2)])
    assert [wanted.waits_for_rest(some) for some in ([key(1)], [key(1), key(2)], [])] == [False, True, True]
    assert set(wanted.take() or ()) == {key(2)}
    wanted.answered({key(2): 0}, 12)
    assert not wanted and wanted.take() is None


def test_asking_for_all_begins_the_rest_anew() -> None:
    wanted = known_as_of(7)
    wanted.answered({key(0): 8}, 8, [key(0)])
    wanted.request_all()
    assert wanted.take() == ALL
    wanted.answered(ALL, 9, [key(1)])
    assert set(wanted.take() or ()) == {key(1)}
    wanted.begin()
    assert wanted.take() == ALL and not wanted.waits_for_rest([key(1)])


def test_more_than_a_question_may_name_did_not_fit() -> None:
    """Older epochs of a partition come first, and what changed meanwhile does not come between."""
    wanted = known_as_of(7)
    rest = [RangeKey(b"t" * 16, partition, epoch) for epoch in (2, 1) for partition in range(RANGES_ASKED_MAX)]
    wanted.answered(ALL, 7, rest)
    wanted.changed([key(RANGES_ASKED_MAX)], 8)
    asked: list[RangeKey] = []
    while len(asked) < len(rest):
        question = wanted.take()
        assert question and len(question) == RANGES_ASKED_MAX
        asked += question
        wanted.answered(question, 9)
    assert asked == sorted(rest)
    assert wanted.take() == {key(RANGES_ASKED_MAX): 8}


class Asked:
    """Notes what each GetGrants named."""

    def __init__(self, world: World) -> None:
        self.asked: list[set[int]] = []
        self.epochs: list[set[int]] = []
        self.refuse = 0
        self.refuse_settling = False
        peer = world.coordinator
        self._settle_ranges, self._get_grants = peer.settle_ranges, peer.get_grants
        peer.settle_ranges, peer.get_grants = self.settle_ranges, self.get_grants

    async def settle_ranges(self, request: pb.SettleRangesRequest) -> pb.SettleRangesResponse:
        if self.refuse_settling:
            raise Unavailable("not now")
        return await self._settle_ranges(request)

    async def get_grants(self, request: pb.GetGrantsRequest) -> pb.GetGrantsResponse:
        self.asked.append({item.partition for item in request.only})
        self.epochs.append({item.epoch for item in request.only})
        if self.refuse:
            self.refuse -= 1
            raise Unavailable("not now")
        return await self._get_grants(request)


@pytest.fixture
def coordinator(world: World) -> Asked:
    return Asked(world)


async def test_a_new_topic_is_asked_about_alone(tmp_path: Path, world: World, coordinator: Asked) -> None:
    await world.create_topic("old", 50)
    service = await started(tmp_path, world.coordinator)
    logs = service.agent.running().logs
    await eventually(lambda: logs.led("old", 49) is not None)
    del coordinator.asked[:]
    coordinator.refuse = 1
    await world.create_topic("new", 3)
    await eventually(lambda: all(logs.led("new", partition) for partition in range(3)))
    assert set().union(*coordinator.asked) == {0, 1, 2}
    assert all(coordinator.asked), "nothing asks for all"
    assert logs.led("old", 49) is not None
    await world.delete_topic("new")
    await eventually(lambda: logs.led("new", 0) is None)
    assert all(coordinator.asked) and logs.led("old", 49) is not None
    await kill(service)


async def test_a_range_that_is_led_waits_for_nothing_that_is_omitted_later(
    tmp_path: Path, world: World, coordinator: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.create_topic("orders", 3)
    service = await started(tmp_path, world.coordinator)
    running = service.agent.running()
    await eventually(lambda: all(running.logs.led("orders", partition) for partition in range(3)))
    await world.keep_snapshots(encode_snapshot({7: ProducerState(0, (WrittenBatch(0, 1, 0),))}))
    monkeypatch.setattr("streamhouse_coordinator.core.sessions.SNAPSHOTS_BYTES_MAX", 1)
    asked = len(coordinator.asked)
    await running.grants.refresh()
    assert coordinator.asked[asked:] == [set()]
    omitted = [grant.snapshot_omitted for grant in world.coordinator.answers["get_grants"][-1].grants]
    assert omitted == [False, True, True]
    assert all(running.logs.led("orders", partition) for partition in range(3))
    await kill(service)


async def test_a_range_that_is_finished_while_its_end_is_asked_for_is_dropped(
    tmp_path: Path, world: World, coordinator: Asked
) -> None:
    """The answer is from before the registration, whose event finds a log that is not known to have an end."""
    topic_id = await world.create_topic("orders", 1)
    service = await started(tmp_path, world.coordinator)
    logs, first = service.agent.running().logs, RangeKey(topic_id, 0, 1)
    await eventually(lambda: logs.led("orders", 0) is not None)
    asked = len(coordinator.asked)
    answers = world.coordinator.hold_answers("get_grants")
    await world.settle(first, 10)
    await eventually(lambda: len(coordinator.asked) > asked)
    assert await world.register(first, 0, 10)
    held = logs.get(first)
    assert held is not None
    await eventually(lambda: held.log.registered_end == 10)
    answers.release()
    await eventually(lambda: logs.get(first) is None)
    await kill(service)


def one_record() -> ingest_pb2.ProduceRequest:
    return ingest_pb2.ProduceRequest(topic="orders", batch=encode_batch(Records.from_lists([b"v"], timestamps_ms=1)))


async def _with_older_range(tmp_path: Path, world: World) -> tuple[IngestService, RangeKey]:
    """Returns an agent that leads orders/0 anew, and still holds its range of an earlier life: ten records, settled and
    not registered."""
    topic_id = await world.create_topic("orders", 1)
    service = await started(tmp_path, world.coordinator)
    logs = service.agent.running().logs
    await eventually(lambda: logs.led("orders", 0) is not None)
    for _ in range(10):
        await service.api.produce(one_record())
    await kill(service)
    service = await started(tmp_path, world.coordinator)
    logs = service.agent.running().logs
    await eventually(lambda: logs.led("orders", 0) is not None)
    older = RangeKey(topic_id, 0, 1)
    held = logs.get(older)
    assert held is not None and held.log.settled_end == 10
    return service, older


async def test_a_range_whose_events_say_that_it_is_finished_is_dropped_without_a_question(
    tmp_path: Path, world: World, coordinator: Asked
) -> None:
    service, older = await _with_older_range(tmp_path, world)
    logs = service.agent.running().logs
    del coordinator.asked[:]
    assert await world.register(older, 0, 4)
    assert await world.register(older, 4, 10)
    assert await world.register(older, 4, 10) is False
    await eventually(lambda: logs.get(older) is None)
    assert coordinator.asked == []
    assert logs.led("orders", 0) is not None
    await kill(service)


async def test_a_range_that_moved_is_dropped_without_a_question(
    tmp_path: Path, world: World, coordinator: Asked
) -> None:
    topic_id = await world.create_topic("orders", 1)
    service = await started(tmp_path, world.coordinator)
    logs, first = service.agent.running().logs, RangeKey(topic_id, 0, 1)
    await eventually(lambda: logs.led("orders", 0) is not None)
    await service.api.produce(one_record())
    async with segmenting(world, service):
        asked = len(coordinator.asked)
        await world.move(first)
        await eventually(lambda: logs.get(first) is None and logs.led("orders", 0) is not None)
    assert coordinator.epochs[asked:] == [{1}, {2}], "what is to be moved and what is granted, not where it ended"
    await kill(service)


async def test_a_range_that_is_finished_while_a_question_is_under_way_does_not_come_back(
    tmp_path: Path, world: World, coordinator: Asked
) -> None:
    """The answer, from before, names the range: a log held for it anew would have none of its records, and report them
    as lost."""
    service, older = await _with_older_range(tmp_path, world)
    running = service.agent.running()
    asked = len(coordinator.asked)
    answers = world.coordinator.hold_answers("get_grants")
    running.grants.request_all()
    await eventually(lambda: len(coordinator.asked) > asked)
    assert await world.register(older, 0, 10)
    await eventually(lambda: running.current_session.position == world.position)
    answers.release()
    await eventually(lambda: running.logs.get(older) is None and not running.grants._pending)
    assert "report_lost" not in world.coordinator.calls and service.tasks.error is None
    await kill(service)


async def test_an_end_that_the_coordinator_does_not_know_finishes_no_range(
    tmp_path: Path, world: World, coordinator: Asked
) -> None:
    """A move has settled the log, and its call fails: were the log dropped, the next session would name no end of a
    range that the coordinator takes for open."""
    topic_id = await world.create_topic("orders", 1)
    service = await started(tmp_path, world.coordinator)
    logs, first = service.agent.running().logs, RangeKey(topic_id, 0, 1)
    await eventually(lambda: logs.led("orders", 0) is not None)
    await service.api.produce(one_record())
    coordinator.refuse_settling = True
    await world.cut_off(first)
    await eventually(lambda: (held := logs.get(first)) is not None and held.log.settled_end == 1)
    assert await world.register(first, 0, 1)
    held = logs.get(first)
    assert held is not None
    await eventually(lambda: held.log.registered_end == 1)
    await eventually(lambda: not service.agent.running().grants._pending)
    assert logs.get(first) is held
    coordinator.refuse_settling = False
    await eventually(lambda: logs.get(first) is None)
    await kill(service)
