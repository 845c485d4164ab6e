"""Two agents that both believe they lead the same partition: a real coordinator, a segmenter and a query service in
this process, and two ingest agents. The coordinator takes the first agent for dead while that one hears nothing of it;
its lease would run for another hour, so nothing here can be the work of a TTL or of a clock.

Quotes the guarantees of docs/guarantees.md:

- G1 A record acknowledged at an offset is readable there until retention removes it.
- G2 An offset never changes its record and is never given out twice.
- G3 A partition is read in ascending order, without skipping an acknowledged record.
- G4 Only the holder of an epoch can add to its range, and only at its end.
"""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from shproto.errors import NotLeader
from shproto.events import RangeLost
from shproto.v1 import coordinator_pb2, types_pb2

from tests.integration.rivals import Rivals, rivals, until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

WAL, DURABLE = types_pb2.ACKS_WAL, types_pb2.ACKS_DURABLE
FENCED = coordinator_pb2.REGISTRATION_RESULT_FENCED
STORED, IN_LOG, ZOMBIE, NEW = 3, 4, 5, 6
IN_FLIGHT_END = STORED + IN_LOG + 1
OLD_END = IN_FLIGHT_END + ZOMBIE + 1
"""What the first agent has handed out offsets for: two of them are durable writes that it may not acknowledge."""


class Waiting:
    """Durable writes of the deposed agent, none of which may be acknowledged before they are registered."""

    def __init__(self, found: Rivals) -> None:
        self._rivals = found
        self._tasks: list[asyncio.Task[int]] = []

    def write(self) -> None:
        self._tasks.append(asyncio.create_task(self._rivals.produce("old", b"durable, by the deposed agent", DURABLE)))

    def check_none_is_acknowledged(self) -> None:
        assert not [task for task in self._tasks if task.done()], "acknowledged, or refused, without having heard"

    async def outcomes(self) -> list[Any]:
        return await asyncio.gather(*self._tasks, return_exceptions=True)


async def two_leaders(found: Rivals, min_acks: int) -> Waiting:
    """Both believe they lead and write. The old one has stored some, has some in its log only (where the topic allows
    that), and a segmenter is about to upload what it announced while it led."""
    waiting = Waiting(found)
    await found.produce_many("old", "stored", STORED, DURABLE)
    if min_acks == WAL:
        await found.produce_many("old", "in the log", IN_LOG, WAL)
    found.store.gate.clear()
    waiting.write()
    await until(lambda: found.store.waiting == 1)
    await found.depose("old")
    await found.leads("new")
    assert found.is_leading("old") and found.is_leading("new")
    if min_acks == WAL:
        for n in range(ZOMBIE):
            await found.produce("old", b"zombie %d" % n, WAL)
            await found.produce("new", b"new %d" % n, WAL)
    waiting.write()
    await until(lambda: found.ears["old"].refused)
    waiting.check_none_is_acknowledged()
    return waiting


async def test_g1_g2_g3_g4_both_write_and_all_of_it_is_there_once_the_first_one_is_back(
    storage: dict[str, str], tmp_path: Path
) -> None:
    async with rivals(storage["STREAMHOUSE_PG_DSN"], tmp_path, WAL) as found:
        waiting = await two_leaders(found, WAL)
        found.store.gate.set()
        await found.produce_many("new", "durable", NEW, DURABLE)
        await until(lambda: _is_registered(found, 1, IN_FLIGHT_END))
        waiting.check_none_is_acknowledged()
        response = await found.fetch(IN_FLIGHT_END)
        assert not response.batches and "unsettled" in response.waiting_reason, "readers wait, and nothing is skipped"

        found.ears["old"].deaf = False
        offsets = await waiting.outcomes()
        assert offsets == [IN_FLIGHT_END - 1, OLD_END - 1], "acknowledged by the registration that covers them"
        assert (await found.range(1)).end_offset == OLD_END
        await until(lambda: not found.is_leading("old"))
        with pytest.raises(NotLeader):
            await found.produce("old", b"late", WAL)
        assert sorted(found.acknowledged) == [*range(OLD_END), *range(2**30, 2**30 + ZOMBIE + NEW)]
        assert await found.read() == (found.acknowledged, [])
        assert list((await found.read())[0]) == sorted(found.acknowledged)
        await found.check_registry()


async def _is_registered(found: Rivals, epoch: int, end_offset: int) -> bool:
    return (await found.range(epoch)).registered_end == end_offset


async def test_g1_g2_g3_g4_what_only_a_deposed_leader_has_is_given_up_by_declaration_alone(
    storage: dict[str, str], tmp_path: Path
) -> None:
    """`partition settle --lost` between: what the first one acknowledged is given up, and the events say so."""
    async with rivals(storage["STREAMHOUSE_PG_DSN"], tmp_path, WAL) as found:
        waiting = await two_leaders(found, WAL)
        assert await found.settle_lost(1) == "lost"
        found.store.gate.set()
        await until(lambda: found.witness.judged.get((1, STORED, IN_FLIGHT_END)) == {FENCED})
        await found.produce_many("new", "durable", NEW, DURABLE)
        await found.produce("old", b"zombie of a lost range", WAL)
        waiting.check_none_is_acknowledged()
        kept = {at: value for at, value in found.acknowledged.items() if not STORED <= at < 2**30}

        found.ears["old"].deaf = False
        refused = await waiting.outcomes()
        assert [(type(error), error.details["outcome"]) for error in refused] == [(NotLeader, "unknown")] * 2
        await until(lambda: not found.is_leading("old"))
        (lost,) = await found.events(RangeLost)
        assert isinstance(lost, RangeLost)
        assert (lost.epoch, lost.end_offset, lost.why) == (1, 2**30, "operator the disk burnt")
        assert await found.registered(1) == [(0, 1), (1, 2), (2, STORED)], "nothing of it was registered since"
        assert await found.read() == (kept, [(STORED, 2**30)])
        await found.check_registry()


async def test_g1_g2_g3_g4_of_a_durable_topic_the_deposed_leader_gives_no_acknowledgement(
    storage: dict[str, str], tmp_path: Path
) -> None:
    """The range is settled where its registration was, the next one begins there: both hand out the same offsets, and
    only what is registered was ever acknowledged, or could be read."""
    async with rivals(storage["STREAMHOUSE_PG_DSN"], tmp_path, DURABLE) as found:
        waiting = await two_leaders(found, DURABLE)
        assert (await found.range(1)).end_offset == STORED == (await found.range(2)).start_offset
        assert await found.settle_lost(1) == "settled", "there is nothing to give up"
        assert not (await found.fetch(STORED)).batches, "what is not registered cannot be read"
        found.store.gate.set()
        await until(lambda: found.witness.judged.get((1, STORED, STORED + 1)) == {FENCED})
        new = await found.produce_many("new", "durable", NEW, DURABLE)
        assert new == list(range(STORED, STORED + NEW))
        waiting.check_none_is_acknowledged()

        found.ears["old"].deaf = False
        refused = await waiting.outcomes()
        assert [(type(error), error.details["outcome"]) for error in refused] == [(NotLeader, "unknown")] * 2
        assert await found.events(RangeLost) == []
        assert await found.read() == (found.acknowledged, [])
        assert list(found.acknowledged) == list(range(STORED + NEW))
        await found.check_registry()
