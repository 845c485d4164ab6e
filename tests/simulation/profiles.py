"""Profiles of runs: each makes a situation frequent that drawing alone brings about in one run of hundreds."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.simulation.applications import SESSION_TIMEOUT_MS
from tests.simulation.nemesis import RandomNemesis

SHARE = 0.1
"""Part of all seeds that each profile gets: the rest are ordinary."""
FAULTS_S = (2.0, 9.0)
"""How long a cluster has to stand faults. Long enough for leases (2.5 s) to run out several times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Differences from an ordinary run; everything else is drawn as in any other.

    faults_s: bounds of how long there are faults. often: the kinds that every other fault is of. queries_min,
    members_min: nodes of the query service, and members of the group. roaming_readers: hand-written readers ask another
    query service each time. sessions_ms: session timeouts, of which each member draws one. churn: members come and go
    by themselves. writers: of a numbered stream, which take it over from each other. tenth: which tenth of all seeds
    has the profile; none for the ordinary one.
    """

    faults_s: tuple[float, float] = FAULTS_S
    often: Sequence[Callable[[RandomNemesis], None]] = ()
    queries_min: int = 1
    members_min: int = 0
    roaming_readers: bool = False
    sessions_ms: Sequence[int] = SESSION_TIMEOUT_MS
    churn: bool = True
    writers: int = 0
    tenth: int = -1


ORDINARY = "ordinary"
PROFILES: dict[str, Profile] = {
    ORDINARY: Profile(),
    # A reader has records of one query service and asks another one, whose event feed is behind, for what follows.
    "roaming-readers": Profile(tenth=0, roaming_readers=True, queries_min=2, often=(RandomNemesis.hold_back_feed,)),
    # A member does not hear that its session is over, and commits what it has read when its successor has read on.
    "late-commits": Profile(
        tenth=1,
        members_min=2,
        sessions_ms=(1_500,),
        churn=False,
        often=(RandomNemesis.put_member_out,),
        faults_s=(8.0, 12.0),
    ),
    # Writers of one numbered stream fence each other, are killed and paused, and lose their leaders, in the middle of a
    # write. The tenth is one of which no seed had found anything when the profile came: those stay what they were.
    "numbered-streams": Profile(
        tenth=8,
        writers=3,
        often=(RandomNemesis.disturb_writer, RandomNemesis.move_leader),
        faults_s=(6.0, 12.0),
    ),
}


def drawn(seed: int) -> str:
    """Returns the name of the profile that the seed has when none is asked for."""
    # Of its own source: a seed that is ordinary stays the run it was before there were profiles.
    chance = random.Random(f"profile of {seed}").random()
    tenth = int(chance / SHARE)
    return next((name for name, profile in PROFILES.items() if profile.tenth == tenth), ORDINARY)
