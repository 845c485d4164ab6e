"""Decides which agents the workers cannot reach; other agents lead their partitions. Workers are segmenters, query and
SQL services. Pure.

Coordinators and producers reach such an agent and its lease is renewed, but its records are neither uploaded nor read.
No safety depends on the decision: an agent that hands a partition over settles the range at its true end.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from shproto.events import AgentCutOff, AgentReachable, Event

from streamhouse_coordinator.core.sessions import SEGMENTER
from streamhouse_coordinator.core.tables import CutOffRow, ReachReportRow, SessionRow

QUERY, SQL = "query", "sql"
WORKERS = (SEGMENTER, QUERY, SQL)
# A single worker's report moves no partition while another worker could have been asked.
REPORTERS_MIN = 2
# The time for which an agent has to be reachable before it leads again doubles with every time the agent was cut off,
# so that a link that comes and goes does not move partitions to and fro; an hour of calm resets it.
HOLD_DOUBLINGS_MAX = 5
CALM_MS = 3_600_000


@dataclass(frozen=True, slots=True)
class ReachTimes:
    """Time limits. `after_ms`: for how long workers must have failed to reach an agent. `hold_ms`: for how long the
    agent must be reachable again before it leads. `fresh_ms`: the greatest age of a report that counts."""

    after_ms: int
    hold_ms: int
    fresh_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """Recent reports of live workers about an agent. `failing_since_ms`: since when the first of them fails; 0: none
    fails."""

    failing: list[SessionRow]
    reaching: list[SessionRow]
    failing_since_ms: int
    changed_ms: int


def reach_of(
    agent: SessionRow,
    reports: Iterable[ReachReportRow],
    workers: Mapping[str, SessionRow],
    now_ms: int,
    reach_times: ReachTimes,
) -> Reach:
    """Returns the summary of the reports about `agent`. `workers`: live workers by session_id."""
    about = [
        row
        for row in reports
        if row.agent_session_id == agent.session_id
        and row.session_id in workers
        and now_ms - row.reported_ms <= reach_times.fresh_ms
    ]
    failing = [row for row in about if not row.reached]
    return Reach(
        failing=[workers[row.session_id] for row in failing],
        reaching=[workers[row.session_id] for row in about if row.reached],
        failing_since_ms=min((row.since_ms for row in failing), default=0),
        changed_ms=max((row.since_ms for row in about), default=0),
    )


def is_cut_off(reach: Reach, workers: Collection[SessionRow]) -> bool:
    """Returns True if several workers (or the only worker) cannot reach the agent and none can; or if several of a role
    cannot and fewer of that role can, since without the role no record is uploaded or read."""
    if not reach.failing:
        return False
    if not reach.reaching and len(reach.failing) >= min(REPORTERS_MIN, len(workers)):
        return True
    for role in WORKERS:
        failing = sum(row.role == role for row in reach.failing)
        if failing >= REPORTERS_MIN and failing > sum(row.role == role for row in reach.reaching):
            return True
    return False


def decide(
    agents: Sequence[SessionRow],
    workers: Sequence[SessionRow],
    reports: Sequence[ReachReportRow],
    cut_offs: Mapping[str, CutOffRow],
    now_ms: int,
    reach_times: ReachTimes,
) -> list[Event]:
    """Returns the agents that are cut off from now on, and those that may lead again. `agents`, `workers`: live
    sessions. `cut_offs`: by agent id, present and past.

    An agent is cut off only if its reporters reach another agent: workers that reach no agent have lost their own
    network. At most half of the agents are cut off at a time. An agent leads again only if a worker has reached it
    lately and the last reports of the others, however old, do not outweigh that; or if no worker lives.
    """
    by_session = {row.session_id: row for row in workers}
    now = {row.agent_id: reach_of(row, reports, by_session, now_ms, reach_times) for row in agents}
    cut_off_ids = {row.agent_id for row in agents if is_cut_off_now(cut_offs.get(row.agent_id), row)}
    events: list[Event] = []
    for agent in agents:
        name, before = agent.agent_id, cut_offs.get(agent.agent_id)
        reach = now[name]
        cut_off = is_cut_off(reach, workers)
        if name in cut_off_ids and before is not None:
            # A worker without a recent report, as after an outage of PostgreSQL, has not withdrawn its report.
            latest = reach_of(agent, reports, by_session, now_ms, replace(reach_times, fresh_ms=now_ms))
            is_reached = reach.reaching or not workers
            if is_reached and not is_cut_off(latest, workers) and _is_held(latest, before, now_ms, reach_times):
                # Counts at once for the agents that follow: at most half of them are cut off after this decision.
                cut_off_ids.discard(name)
                events.append(AgentReachable(name, agent.session_id, now_ms))
        elif (
            cut_off
            and now_ms - reach.failing_since_ms >= reach_times.after_ms
            and len(cut_off_ids) < len(agents) // 2
            and _has_another(agent, agents, now, cut_off_ids)
        ):
            cut_off_ids.add(name)
            reporters = tuple(sorted(row.agent_id for row in reach.failing))
            events.append(
                AgentCutOff(
                    agent_id=name,
                    session_id=agent.session_id,
                    reporters=reporters,
                    since_ms=now_ms,
                    times=_times(before, now_ms),
                )
            )
    return events


def is_cut_off_now(row: CutOffRow | None, agent: SessionRow) -> bool:
    """True if the agent is cut off in this session; another session may have another network."""
    return row is not None and not row.reachable_ms and row.session_id == agent.session_id


def _is_held(reach: Reach, row: CutOffRow, now_ms: int, reach_times: ReachTimes) -> bool:
    hold_ms = reach_times.hold_ms << min(row.times - 1, HOLD_DOUBLINGS_MAX)
    return now_ms - max(reach.changed_ms, row.since_ms) >= hold_ms


def _has_another(
    agent: SessionRow, agents: Sequence[SessionRow], now: Mapping[str, Reach], cut_off_ids: Collection[str]
) -> bool:
    # Reporters that reach no agent have lost their own network: moving partitions would help no reader.
    reporters = {row.session_id for row in now[agent.agent_id].failing}
    return any(
        not reporters & {row.session_id for row in now[other.agent_id].failing}
        for other in agents
        if other.agent_id != agent.agent_id and other.agent_id not in cut_off_ids
    )


def _times(row: CutOffRow | None, now_ms: int) -> int:
    if row is None or (row.reachable_ms and now_ms - row.reachable_ms >= CALM_MS):
        return 1
    return row.times + 1


def outdated(
    agents: Iterable[SessionRow],
    workers: Iterable[SessionRow],
    reports: Iterable[ReachReportRow],
    cut_off_ids: Collection[str],
) -> list[ReachReportRow]:
    """Returns reports without use: of ended sessions, and successes about agents that every worker reaches and that are
    not cut off. `cut_off_ids`: session ids of cut-off agents."""
    agent_ids, worker_ids = {row.session_id for row in agents}, {row.session_id for row in workers}
    rows = list(reports)
    to_check = {row.agent_session_id for row in rows if not row.reached} | set(cut_off_ids)
    return [
        row
        for row in rows
        if row.agent_session_id not in agent_ids
        or row.session_id not in worker_ids
        or row.agent_session_id not in to_check
    ]
