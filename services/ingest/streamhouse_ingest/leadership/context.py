"""Context of the parts of leadership: values that they share; session.py opens and clears session and lease."""

from collections.abc import Callable
from dataclasses import dataclass

from shproto.services import CoordinatorApi
from shruntime.clock import Clock
from shruntime.tasks import Backoff

from streamhouse_ingest.log.history import History
from streamhouse_ingest.log.lease import Lease
from streamhouse_ingest.log.session_id import CurrentSession
from streamhouse_ingest.metrics import IngestMetrics


@dataclass(frozen=True, slots=True)
class Identity:
    """The agent's name, the id of its log, and the address at which others reach it."""

    agent_id: str
    wal_id: bytes
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LeadershipContext:
    """The agent, its coordinator and its session. `backoff` makes the waits of a series of tries."""

    identity: Identity
    coordinator: CoordinatorApi
    clock: Clock
    session: CurrentSession
    lease: Lease
    history: History
    metrics: IngestMetrics
    backoff: Callable[[], Backoff]
