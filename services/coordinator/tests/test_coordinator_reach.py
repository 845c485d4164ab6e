"""Which agents are cut off from their workers: never by the word of one while others reach it, and no to and fro."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shproto.events import AgentCutOff, AgentReachable, Event
from streamhouse_coordinator.core.projection import Put, row_ops
from streamhouse_coordinator.core.reach import HOLD_DOUBLINGS_MAX, ReachTimes, decide, outdated
from streamhouse_coordinator.core.tables import CutOffRow, ReachReportRow, SessionRow

pytestmark = pytest.mark.quick

PATIENCE = ReachTimes(after_ms=15_000, hold_ms=30_000, fresh_ms=30_000)
BEAT_MS = 10_000


def session(name: str, role: str) -> SessionRow:
    return SessionRow(
        session_id=f"session {name}", agent_id=name, role=role, address=f"{name}:1", wal_id="", started_ms=0
    )


@dataclass
class Fleet:
    """Agents a, b, …; segmenters s1, s2, …; query services q1, …; and what they report, in virtual time."""

    agents: str = "ab"
    segmenters: int = 2
    queries: int = 1
    now_ms: int = 1_000_000
    reports: dict[tuple[str, str], ReachReportRow] = field(default_factory=dict)
    cut_offs: dict[str, CutOffRow] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)

    @property
    def workers(self) -> list[SessionRow]:
        names = [(f"s{n + 1}", "segmenter") for n in range(self.segmenters)]
        return [session(*name) for name in [*names, *((f"q{n + 1}", "query") for n in range(self.queries))]]

    def beat(self, *said: tuple[str, str, bool], for_ms: int = BEAT_MS) -> None:
        """Everybody says once (worker, agent, reached); then time passes."""
        for worker, agent, reached in said:
            key = (f"session {worker}", f"session {agent}")
            before = self.reports.get(key)
            since_ms = before.since_ms if before is not None and before.reached == reached else self.now_ms
            self.reports[key] = ReachReportRow(
                session_id=key[0],
                agent_session_id=key[1],
                reached=reached,
                since_ms=since_ms,
                reported_ms=self.now_ms,
            )
        self.now_ms += for_ms
        self.decide()

    def decide(self) -> list[Event]:
        agents = [session(name, "ingest") for name in self.agents]
        events = decide(
            agents, self.workers, list(self.reports.values()), self.cut_offs, self.now_ms, PATIENCE
        )  # fmt: skip
        for event in events:
            for op in row_ops(event):
                if isinstance(op, Put):
                    self.cut_offs[op.row.agent_id] = op.row
                else:
                    assert isinstance(event, AgentReachable)
                    row = self.cut_offs[event.agent_id]
                    self.cut_offs[event.agent_id] = CutOffRow(
                        agent_id=row.agent_id,
                        session_id=row.session_id,
                        reporters=row.reporters,
                        since_ms=row.since_ms,
                        times=row.times,
                        reachable_ms=event.reachable_ms,
                    )
        self.events += events
        return events

    @property
    def cut_off(self) -> set[str]:
        return {name for name, row in self.cut_offs.items() if not row.reachable_ms}


def failing(agent: str, *workers: str) -> list[tuple[str, str, bool]]:
    return [(worker, agent, False) for worker in workers]


def reaching(agent: str, *workers: str) -> list[tuple[str, str, bool]]:
    return [(worker, agent, True) for worker in workers]


def test_several_that_fail_for_long_enough_cut_an_agent_off() -> None:
    fleet = Fleet()
    fleet.beat(*failing("a", "s1", "s2", "q1"))
    assert not fleet.cut_off, "it may be starting again"
    fleet.beat(*failing("a", "s1", "s2", "q1"))
    assert fleet.events == [
        AgentCutOff(agent_id="a", session_id="session a", reporters=("q1", "s1", "s2"), since_ms=fleet.now_ms, times=1)
    ]


def test_of_a_single_reporter_nothing_moves_while_others_reach_the_agent() -> None:
    fleet = Fleet(segmenters=3)
    for _ in range(20):
        fleet.beat(*failing("a", "s1"), *reaching("a", "s2", "q1"))
    assert not fleet.events
    for _ in range(20):
        fleet.beat(*failing("a", "s1"))
    assert not fleet.events, "the others have not been heard for long, and were not asked"


def test_all_segmenters_are_enough_though_query_services_reach_it() -> None:
    """Nobody uploads what it takes: no durable acknowledgement, for as long as that lasts."""
    fleet = Fleet(segmenters=2, queries=3)
    for _ in range(3):
        fleet.beat(*failing("a", "s1", "s2"), *reaching("a", "q1", "q2", "q3"))
    assert fleet.cut_off == {"a"}


def test_a_minority_of_a_role_is_not() -> None:
    fleet = Fleet(segmenters=4, queries=0)
    for _ in range(5):
        fleet.beat(*failing("a", "s1", "s2"), *reaching("a", "s3", "s4"))
    assert not fleet.events


@pytest.mark.parametrize(("segmenters", "queries", "reporters"), [(1, 0, ["s1"]), (0, 1, ["q1"]), (1, 1, ["s1", "q1"])])
def test_a_fleet_with_few_workers(segmenters: int, queries: int, reporters: list[str]) -> None:
    fleet = Fleet(segmenters=segmenters, queries=queries)
    for _ in range(3):
        fleet.beat(*failing("a", *reporters))
    assert fleet.cut_off == {"a"}


def test_one_of_two_workers_is_not_enough() -> None:
    fleet = Fleet(segmenters=1, queries=1)
    for _ in range(5):
        fleet.beat(*failing("a", "s1"))
    assert not fleet.events


def test_workers_that_reach_nobody_have_lost_their_own_network() -> None:
    fleet = Fleet(agents="abc")
    for _ in range(5):
        fleet.beat(*(said for agent in "abc" for said in failing(agent, "s1", "s2", "q1")))
    assert not fleet.events


def test_at_most_half_of_the_agents_are_cut_off() -> None:
    fleet = Fleet(agents="abcde")
    for _ in range(5):
        fleet.beat(*(said for agent in "abcd" for said in failing(agent, "s1", "s2", "q1")))
    assert len(fleet.cut_off) == 2
    alone = Fleet(agents="a")
    for _ in range(5):
        alone.beat(*failing("a", "s1", "s2", "q1"))
    assert not alone.cut_off, "nobody else is there to lead"


def test_old_reports_do_not_count() -> None:
    fleet = Fleet()
    fleet.beat(*failing("a", "s1", "s2", "q1"))
    fleet.beat(for_ms=PATIENCE.fresh_ms)
    assert not fleet.events


def test_it_leads_again_only_once_it_has_been_reachable_for_a_while() -> None:
    fleet = Fleet()
    for _ in range(3):
        fleet.beat(*failing("a", "s1", "s2", "q1"))
    cut_off_ms = fleet.now_ms
    while fleet.cut_off:
        fleet.beat(*reaching("a", "s1", "s2", "q1"))
        assert fleet.now_ms - cut_off_ms <= PATIENCE.hold_ms + 2 * BEAT_MS
    assert isinstance(fleet.events[-1], AgentReachable)
    assert fleet.now_ms - cut_off_ms >= PATIENCE.hold_ms
    before = len(fleet.events)
    for _ in range(5):
        fleet.beat()
    assert len(fleet.events) == before


def test_an_outage_in_which_nobody_could_report_lets_no_agent_lead_again() -> None:
    """On the first sweep after it all reports were old, and every agent that was cut off led again."""
    fleet = Fleet()
    for _ in range(3):
        fleet.beat(*failing("a", "s1", "s2", "q1"))
    assert fleet.cut_off == {"a"}
    fleet.beat(for_ms=10 * PATIENCE.hold_ms)
    assert fleet.cut_off == {"a"}
    fleet.beat(*failing("a", "s1", "s2", "q1"))
    assert len(fleet.events) == 1


def test_after_an_outage_the_first_worker_that_reports_does_not_speak_for_the_others() -> None:
    """All segmenters fail, the query service gets through: its report may be the first one afterwards."""
    fleet = Fleet()
    for _ in range(4):
        fleet.beat(*failing("a", "s1", "s2"), *reaching("a", "q1"))
    assert fleet.cut_off == {"a"}
    fleet.beat(for_ms=10 * PATIENCE.hold_ms)
    fleet.beat(*reaching("a", "q1"), for_ms=1_000)
    assert fleet.cut_off == {"a"}
    while fleet.cut_off:
        fleet.beat(*reaching("a", "s1", "s2", "q1"))
        assert fleet.now_ms < 2_000_000


def test_it_leads_again_once_no_worker_lives() -> None:
    fleet = Fleet()
    for _ in range(3):
        fleet.beat(*failing("a", "s1", "s2", "q1"))
    fleet.segmenters = fleet.queries = 0
    fleet.beat(for_ms=PATIENCE.hold_ms)
    assert not fleet.cut_off


def test_a_link_that_comes_and_goes_moves_partitions_ever_less_often() -> None:
    fleet = Fleet()
    for beat in range(6 * 60 * 4):  # four hours; 30 s of silence in every 90
        said = failing if beat % 9 < 3 else reaching
        fleet.beat(*said("a", "s1", "s2", "q1"))
    cuts = [event for event in fleet.events if isinstance(event, AgentCutOff)]
    assert 1 <= len(cuts) <= 3
    assert all(cuts[n].times == n + 1 for n in range(len(cuts)))


def test_another_session_of_the_agent_has_its_own_chance() -> None:
    fleet = Fleet()
    for _ in range(3):
        fleet.beat(*failing("a", "s1", "s2", "q1"))
    moved = [session("a", "ingest"), session("b", "ingest")]
    moved[0] = SessionRow(
        session_id="another session", agent_id="a", role="ingest", address="elsewhere:1", wal_id="", started_ms=0
    )
    reports = list(fleet.reports.values())
    assert decide(moved, fleet.workers, reports, fleet.cut_offs, fleet.now_ms, PATIENCE) == []


def test_reports_that_nobody_needs_go() -> None:
    agents, workers = [session("a", "ingest"), session("b", "ingest")], [session("s1", "segmenter")]
    doubt = ReachReportRow(
        session_id="session s1", agent_session_id="session a", reached=False, since_ms=0, reported_ms=0
    )
    good = ReachReportRow(
        session_id="session s1", agent_session_id="session b", reached=True, since_ms=0, reported_ms=0
    )
    gone = ReachReportRow(
        session_id="session s9", agent_session_id="session a", reached=True, since_ms=0, reported_ms=0
    )
    assert outdated(agents, workers, [doubt, good, gone], ()) == [good, gone]
    assert outdated(agents, workers, [doubt, good], {"session b"}) == []


@given(
    said=st.lists(
        st.lists(st.tuples(st.sampled_from(["s1", "s2", "s3", "q1", "q2"]), st.sampled_from("abcd"), st.booleans())),
        max_size=60,
    )
)
def test_whatever_is_said_most_agents_go_on_and_none_flaps(
    said: list[list[tuple[str, str, bool]]],
) -> None:
    fleet = Fleet(agents="abcd", segmenters=3, queries=2)
    last: dict[str, int] = {}
    for words in said:
        before = len(fleet.events)
        fleet.beat(*words)
        assert len(fleet.cut_off) <= 2
        for event in fleet.events[before:]:
            assert isinstance(event, AgentCutOff | AgentReachable)
            if isinstance(event, AgentReachable):
                hold_ms = PATIENCE.hold_ms << min(fleet.cut_offs[event.agent_id].times - 1, HOLD_DOUBLINGS_MAX)
                assert fleet.now_ms - last[event.agent_id] >= hold_ms
            else:
                assert len(event.reporters) >= 2
                last[event.agent_id] = fleet.now_ms
