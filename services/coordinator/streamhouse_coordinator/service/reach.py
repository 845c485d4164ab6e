"""Collects the workers' reports about agents, and changes the leadership of agents that workers cannot reach."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shproto.errors import InvalidArgument
from shproto.events import AgentCutOff, AgentReachable, Event

from streamhouse_coordinator.core import reach
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.projection import Put, Remove
from streamhouse_coordinator.core.sessions import INGEST
from streamhouse_coordinator.ports import Above, In, Transaction, where, where_keys
from streamhouse_coordinator.service.common import (
    Context,
    change_leadership,
    commit_leadership,
    cut_off_sessions,
    live_session,
)
from streamhouse_coordinator.settings import CoordinatorSettings

log = logging.getLogger(__name__)

# Two heartbeats of a worker may be lost before its reports are too old.
REPORTS_FRESH_HEARTBEATS = 3


def reach_times(settings: CoordinatorSettings) -> reach.ReachTimes:
    """Returns the times of `decide` as configured."""
    return reach.ReachTimes(
        settings.cut_off_after_ms,
        settings.cut_off_hold_ms,
        REPORTS_FRESH_HEARTBEATS * settings.heartbeat_interval_ms,
    )


async def report(context: Context, session_id: str, reached: Mapping[str, bool]) -> list[t.SessionRow]:
    """Records which agents a worker reaches, by agent id. Returns the agents that the worker has to check: agents that
    some worker cannot reach, and agents that are cut off. Raises SessionExpired, InvalidArgument for another role."""

    async def work(tx: Transaction) -> list[t.SessionRow]:
        to_check = {row.agent_session_id for row in await tx.select(t.REACH_REPORTS, where(reached=False))}
        to_check |= await cut_off_sessions(tx)
        # The usual case: nothing to report and no agent to check; the heartbeat costs two reads.
        if not reached and not to_check:
            return []
        worker = await live_session(tx, session_id)
        if worker.role not in reach.WORKERS:
            text = f"session {session_id} is of role {worker.role}; only {', '.join(reach.WORKERS)} check agents"
            raise InvalidArgument(text, field="agents", value=worker.role)
        agents = await tx.select(t.SESSIONS, where(role=INGEST, agent_id=In(reached)))
        before = {row.agent_session_id: row for row in await tx.select(t.REACH_REPORTS, where(session_id=session_id))}
        now_ms = await tx.now_ms()
        rows = [
            _row(session_id, agent, reached[agent.agent_id], before.get(agent.session_id), now_ms)
            for agent in agents
            # A success is worth a row only if another worker reports a failure.
            if not reached[agent.agent_id] or agent.session_id in to_check
        ]
        await tx.apply([Put(t.REACH_REPORTS, row) for row in rows])
        to_check |= {row.agent_session_id for row in rows}
        return await tx.select(t.SESSIONS, where(session_id=In(to_check)), order=("agent_id",))

    return await context.store.run(work)


def _row(
    session_id: str, agent: t.SessionRow, reached: bool, before: t.ReachReportRow | None, now_ms: int
) -> t.ReachReportRow:
    # A repeated report keeps its beginning: the limits count uninterrupted failure or success.
    since_ms = before.since_ms if before is not None and before.reached == reached else now_ms
    return t.ReachReportRow(
        session_id=session_id, agent_session_id=agent.session_id, reached=reached, since_ms=since_ms, reported_ms=now_ms
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReachState:
    """Live sessions, reports, and agents that are or were cut off."""

    agents: list[t.SessionRow]
    workers: list[t.SessionRow]
    reports: list[t.ReachReportRow]
    cut_offs: dict[str, t.CutOffRow]

    def decide(self, now_ms: int, settings: CoordinatorSettings) -> list[Event]:
        """Returns the events that cut agents off, or let them lead again, at `now_ms`; see core.reach.decide."""
        return reach.decide(self.agents, self.workers, self.reports, self.cut_offs, now_ms, reach_times(settings))

    def reach_of(self, agent: t.SessionRow, now_ms: int, settings: CoordinatorSettings) -> reach.Reach:
        """Returns the summary of the recent reports of live workers about `agent`."""
        by_session = {row.session_id: row for row in self.workers}
        return reach.reach_of(agent, self.reports, by_session, now_ms, reach_times(settings))

    def is_cut_off_now(self, agent: t.SessionRow) -> bool:
        """True if the agent is cut off in its present session."""
        return reach.is_cut_off_now(self.cut_offs.get(agent.agent_id), agent)

    def outdated(self) -> list[t.ReachReportRow]:
        """Returns the reports without further use: of ended sessions, or successes about agents that all reach."""
        out = {row.session_id for row in self.cut_offs.values() if not row.reachable_ms}
        return reach.outdated(self.agents, self.workers, self.reports, out)


async def look(tx: Transaction) -> ReachState | None:
    """Returns the live sessions and reports, or None while there are no reports: two reads of empty tables."""
    reports = await tx.select(t.REACH_REPORTS)
    cut_offs = {row.agent_id: row for row in await tx.select(t.CUT_OFFS)}
    if not reports and all(row.reachable_ms for row in cut_offs.values()):
        return None
    # By leases, not sessions: the report of a dead worker must not count until a sweep ends its session.
    live = {row.session_id for row in await tx.select(t.SESSION_LEASES, where(expires_ms=Above(await tx.now_ms())))}
    roles = In((INGEST, *reach.WORKERS))
    sessions = await tx.select(t.SESSIONS, where(role=roles), order=("agent_id",))
    sessions = [row for row in sessions if row.session_id in live]
    agents = [row for row in sessions if row.role == INGEST]
    return ReachState(
        agents=agents, workers=[row for row in sessions if row.role != INGEST], reports=reports, cut_offs=cut_offs
    )


async def is_due(tx: Transaction, settings: CoordinatorSettings) -> tuple[bool, int]:
    """Returns True if `apply` has work, and the number of cut-off agents."""
    found = await look(tx)
    if found is None:
        return False, 0
    due = bool(found.decide(await tx.now_ms(), settings) or found.outdated())
    return due, sum(found.is_cut_off_now(agent) for agent in found.agents)


async def apply(context: Context) -> None:
    """Cuts off agents that workers cannot reach, and lets agents that they reach again lead."""

    async def work(tx: Transaction) -> list[Event]:
        found = await look(tx)
        if found is None:
            return []
        # Read again under the cluster lock: is_due() has looked without.
        await _forget(tx, found.outdated())
        events = found.decide(await tx.now_ms(), context.settings)
        if events:
            await commit_leadership(tx, context.settings, events)
        return events

    for event in await change_leadership(context, work):
        if isinstance(event, AgentCutOff):
            names = ", ".join(event.reporters)
            log.error("%s cannot reach agent %s: others are to lead its partitions", names, event.agent_id)
        elif isinstance(event, AgentReachable):
            log.warning("workers reach agent %s again: it may lead", event.agent_id)


async def _forget(tx: Transaction, reports: Sequence[t.ReachReportRow]) -> None:
    """Removes reports that no heartbeat is writing now, and waits for none: the next sweep removes the others."""
    keys = [(row.session_id, row.agent_session_id) for row in reports]
    of_keys = where_keys(("session_id", "agent_session_id"), keys)
    rows = await tx.select(t.REACH_REPORTS, of_keys, lock="skip") if keys else []
    named = [{"session_id": row.session_id, "agent_session_id": row.agent_session_id} for row in rows]
    await tx.apply([Remove(t.REACH_REPORTS, key) for key in named])
