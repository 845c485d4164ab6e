"""Interfaces through which the segmenter reaches peers, store, time and chance."""

import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from shcluster.agent_checks import AgentChecks
from shproto.services import CoordinatorApi, IngestApi
from shruntime.clock import Clock, SystemClock
from shstore import ObjectStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """Peers, store, time and chance. `ingest_at` returns the API of the agent at an address; `agents` knows the
    agents that do not answer."""

    coordinator: CoordinatorApi
    store: ObjectStore
    ingest_at: Callable[[str], IngestApi]
    clock: Clock = field(default_factory=SystemClock)
    rng: random.Random = field(default_factory=random.SystemRandom)
    agents: AgentChecks = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "agents", AgentChecks(self.ingest_at))

    def new_uuid(self) -> uuid.UUID:
        return uuid.UUID(int=self.rng.getrandbits(128), version=4)
