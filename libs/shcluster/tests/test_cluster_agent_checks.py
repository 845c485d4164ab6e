"""Which agents a worker cannot reach: from the calls that fail to the checks that tell otherwise."""

import asyncio
from typing import Any

import pytest
from shcluster import agent_checks
from shcluster.agent_checks import AgentChecks, is_silence
from shproto.errors import ShuttingDown, StreamHouseError, Unavailable
from shproto.v1 import coordinator_pb2 as pb
from shproto.v1 import ingest_pb2

pytestmark = pytest.mark.quick

SILENT = Unavailable("a:1: DEADLINE_EXCEEDED", address="a:1")
STARTING = Unavailable("the agent is starting: its log is being replayed")


class Agents:
    """By address, what each agent answers; None: nothing, ever."""

    def __init__(self) -> None:
        self.answers: dict[str, StreamHouseError | str | None] = {}
        self.asked: list[str] = []
        self.asked_at_once_max = self._waiting = 0

    def __call__(self, address: str) -> Any:
        agents = self

        class Api:
            async def describe_agent(
                self, request: ingest_pb2.DescribeAgentRequest
            ) -> ingest_pb2.DescribeAgentResponse:
                agents.asked.append(address)
                answer = agents.answers[address]
                if answer is None:
                    await agents._say_nothing()
                if isinstance(answer, StreamHouseError):
                    raise answer
                return ingest_pb2.DescribeAgentResponse()

        return Api()

    async def _say_nothing(self) -> None:
        self._waiting += 1
        self.asked_at_once_max = max(self.asked_at_once_max, self._waiting)
        try:
            await asyncio.Event().wait()
        finally:
            self._waiting -= 1


def said(found: list[pb.AgentReach]) -> dict[str, bool]:
    return {item.agent_id: item.reached for item in found}


@pytest.mark.parametrize(
    ("error", "silence"),
    [(SILENT, True), (STARTING, False), (ShuttingDown("stopping"), False), (StreamHouseError("defect"), False)],
)
def test_an_error_of_the_agent_itself_is_an_answer(error: StreamHouseError, silence: bool) -> None:
    assert is_silence(error) is silence


async def test_nothing_is_asked_or_reported_where_nobody_is_in_doubt() -> None:
    agents = Agents()
    checks = AgentChecks(agents)
    checks.answered("a")
    assert await checks.check() == [] and not agents.asked and not checks.unreachable


@pytest.mark.parametrize(("error", "unreachable"), [(SILENT, {"a"}), (STARTING, set()), (ShuttingDown("x"), set())])
async def test_what_a_call_comes_to_is_noted_and_raised(error: StreamHouseError, unreachable: set[str]) -> None:
    checks = AgentChecks(Agents())
    with pytest.raises(type(error)), checks.calling("a", "a:1"):
        raise error
    assert checks.unreachable == unreachable
    with checks.calling("a", "a:1"):
        pass
    assert not checks.unreachable, "it answered"


@pytest.mark.parametrize(("late_ms", "found"), [(0, {"a": False}), (3_600_000, {})])
async def test_a_call_that_its_caller_gave_up_is_worth_a_check_if_it_was_late(
    monkeypatch: pytest.MonkeyPatch, late_ms: int, found: dict[str, bool]
) -> None:
    monkeypatch.setattr(agent_checks, "LATE_MS", late_ms)
    agents = Agents()
    agents.answers = {"a:1": SILENT}
    checks = AgentChecks(agents)
    with pytest.raises(TimeoutError), checks.calling("a", "a:1"):
        async with asyncio.timeout(0):
            await asyncio.sleep(3600)
    assert not checks.unreachable, "nobody knows yet"
    checks.set_asked({})
    assert said(await checks.check()) == found


async def test_an_agent_that_did_not_answer_is_checked_until_it_does() -> None:
    agents = Agents()
    agents.answers = {"a:1": SILENT}
    checks = AgentChecks(agents)
    checks.failed("a", "a:1")
    assert checks.unreachable == {"a"}
    for _ in range(2):
        assert said(await checks.check()) == {"a": False}
    agents.answers["a:1"] = STARTING
    assert said(await checks.check()) == {"a": True} and not checks.unreachable
    checks.set_asked({})
    assert await checks.check() == [], "once it was reported"


async def test_an_agent_without_a_session_is_forgotten_once_it_was_reported() -> None:
    """One that was scaled down was checked and reported with every heartbeat until the worker itself ended."""
    agents = Agents()
    agents.answers = {"a:1": SILENT, "b:1": SILENT}
    checks = AgentChecks(agents)
    checks.failed("a", "a:1")
    reported = await checks.check()
    checks.failed("b", "b:1")  # after the report: the coordinator has not been asked about it
    assert not checks.set_asked({}, reported)
    assert checks.unreachable == {"b"}
    reported = await checks.check()
    assert said(reported) == {"b": False}
    assert not checks.set_asked({"b": "b:1"}, reported), "it has a session"
    assert said(await checks.check()) == {"b": False}


async def test_what_the_coordinator_doubts_is_checked_for_as_long_as_it_does() -> None:
    agents = Agents()
    agents.answers = {"a:1": "fine", "b:1": SILENT}
    checks = AgentChecks(agents)
    assert checks.set_asked({"a": "a:1", "b": "b:1"})
    assert said(await checks.check()) == {"a": True, "b": False}
    assert not checks.set_asked({"a": "a:1", "b": "b:1"}), "nothing new"
    assert not checks.set_asked({})
    assert said(await checks.check()) == {"b": False}, "our own doubt stays"


async def test_a_round_is_bounded_and_the_next_begins_with_those_that_were_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hundreds of silent agents took longer than the session of the worker that checked them."""
    monkeypatch.setattr(agent_checks, "CHECK_TIMEOUT_MS", 300)
    monkeypatch.setattr(agent_checks, "CHECKS_AT_ONCE", 1)
    agents = Agents()
    names = [f"agent-{number:02}" for number in range(50)]
    agents.answers = dict.fromkeys((f"{name}:1" for name in names), None)
    checks = AgentChecks(agents)
    checks.failed("agent-49", "agent-49:1")
    checks.set_asked({name: f"{name}:1" for name in names})
    first = said(await checks.check(within_ms=0))
    assert not any(first.values())
    asked = len(agents.asked)
    assert "agent-00" in first and "agent-49" in first, "one that was unreachable stays reported"
    assert asked < 10 and len(first) <= asked + 1
    second = said(await checks.check(within_ms=0))
    assert len(agents.asked) - asked < 10
    assert agents.asked[asked] not in {f"{name}:1" for name in sorted(first)[:-1]}
    assert first.keys() < second.keys()


async def test_agents_that_say_nothing_are_checked_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_checks, "CHECK_TIMEOUT_MS", 200)
    agents = Agents()
    names = [f"agent-{number}" for number in range(50)]
    agents.answers = dict.fromkeys((f"{name}:1" for name in names), None)
    checks = AgentChecks(agents)
    checks.set_asked({name: f"{name}:1" for name in names})
    assert said(await checks.check()) == dict.fromkeys(names, False)
    assert agents.asked_at_once_max == len(names)
