"""Which partitions a consumer is given, reads, gives up or has lost, and which callback of the application is next.

Owns: the stage of every partition. Does not own: who assigns partitions, cursors, callbacks, messages to the group.
Invariants: a partition is owned from when it is wanted until its REVOKED step is finished, so that no other member
begins on it before. Steps come one at a time. For each partition ASSIGNED and one of REVOKED and LOST alternate, and a
partition that comes back is opened only once the step that took it away is finished.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import Enum, auto

from streamhouse.records import TopicPartition

Partitions = frozenset[TopicPartition]
NONE: Partitions = frozenset()


class _Stage(Enum):
    OPENING = auto()  # where to begin is being found out
    OPENED = auto()  # that is known; the application is to be told
    READ = auto()
    REVOKED = auto()  # not read any more, and still owned
    LOST = auto()  # perhaps another member's already


class Kind(Enum):
    """A step of a hand-over, named after the callback that tells of it."""

    ASSIGNED = auto()
    REVOKED = auto()
    LOST = auto()


# In the order in which steps are due: what is gone comes before what is new.
_STAGES = {Kind.LOST: _Stage.LOST, Kind.REVOKED: _Stage.REVOKED, Kind.ASSIGNED: _Stage.OPENED}


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """Partitions that the application is told of in one call."""

    kind: Kind
    partitions: Partitions


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """Work that a change leaves for the caller. opening: find out where to begin. forgotten: stop that, and drop what
    is opened. revoked: stop reading, and keep the positions. lost: stop reading. released: begin to read."""

    opening: Partitions = NONE
    forgotten: Partitions = NONE
    revoked: Partitions = NONE
    lost: Partitions = NONE
    released: Partitions = NONE


class HandOver:
    """`want` and `lose` as the group or the subscription says, `opened` once it is known where to begin; then `begin`
    and `finish` each `next_step`. The caller carries out the changes that are returned."""

    def __init__(self) -> None:
        self._wanted: Partitions = NONE
        self._stages: dict[TopicPartition, _Stage] = {}
        self._running: Step | None = None
        self._lost_in_step: set[TopicPartition] = set()  # of what the running step gives up

    @property
    def owned(self) -> Partitions:
        """Partitions that no other member may begin on."""
        kept = (_Stage.READ, _Stage.REVOKED)
        announcing = self._running.partitions if self._running and self._running.kind is Kind.ASSIGNED else NONE
        return self._wanted.union(
            where
            for where, stage in self._stages.items()
            if stage in kept or (stage is _Stage.OPENED and where in announcing)
        )

    @property
    def running(self) -> Step | None:
        """The step that was begun and is not finished."""
        return self._running

    @property
    def lost(self) -> Partitions:
        """Partitions that were lost without the application knowing: what it has of them is not to be committed, also
        if they are the consumer's again."""
        lost = (where for where, stage in self._stages.items() if stage is _Stage.LOST)
        return frozenset(self._lost_in_step).union(lost)

    @property
    def wanted(self) -> Partitions:
        """Partitions that were given last."""
        return self._wanted

    @property
    def is_settled(self) -> bool:
        """True if every partition is being opened or read."""
        return self._running is None and set(self._stages.values()) <= {_Stage.OPENING, _Stage.READ}

    @property
    def is_giving_up(self) -> bool:
        """True until the partitions that were taken away are given up."""
        gone = self._running is not None and self._running.kind is not Kind.ASSIGNED
        return gone or not {_Stage.REVOKED, _Stage.LOST}.isdisjoint(self._stages.values())

    def want(self, partitions: Iterable[TopicPartition]) -> Changes:
        """Reads these partitions from now on, and no others."""
        self._wanted = frozenset(partitions)
        return self._settle()

    def adopt(self, partitions: Iterable[TopicPartition], *, announce: bool) -> None:
        """Counts these partitions as wanted and opened, where there were none before."""
        self._wanted = frozenset(partitions)
        self._stages = dict.fromkeys(self._wanted, _Stage.OPENED if announce else _Stage.READ)

    def opened(self, partitions: Iterable[TopicPartition], *, announce: bool) -> None:
        """Notes that it is known where to begin. announce: the application is told before these are read."""
        for where in partitions:
            assert self._stages[where] is _Stage.OPENING, "it was forgotten"
            self._stages[where] = _Stage.OPENED if announce else _Stage.READ

    def lose(self, partitions: Iterable[TopicPartition] | None = None) -> Changes:
        """Owns these partitions no longer (None: not a single one, and none is wanted): they may be another member's
        already, or of a topic that is gone. Those still wanted are opened anew."""
        running = self._running.partitions if self._running else NONE
        forgotten, lost = set(), set()
        for where in list(self._stages) if partitions is None else list(partitions):
            stage = self._stages.get(where)
            if stage is _Stage.OPENING or (stage is _Stage.OPENED and where not in running):
                del self._stages[where]
                forgotten.add(where)
            elif stage is _Stage.REVOKED and where in running:
                del self._stages[where]  # the application is being told that it is gone
                self._lost_in_step.add(where)
                lost.add(where)
            elif stage is not None:
                self._stages[where] = _Stage.LOST
                lost.add(where)
        if partitions is None:
            self._wanted = NONE
        changes = self._settle()
        return Changes(opening=changes.opening, forgotten=frozenset(forgotten), lost=frozenset(lost))

    def next_step(self, kinds: Collection[Kind]) -> Step | None:
        """Returns the step of one of these kinds that is due; None if there is none, or one is running."""
        if self._running is not None:
            return None
        for kind, due in _STAGES.items():
            partitions = frozenset(where for where, stage in self._stages.items() if stage is due)
            if partitions and kind in kinds:
                return Step(kind, partitions)
        return None

    def begin(self, step: Step) -> None:
        """Begins the step, which was just returned by `next_step`."""
        assert self._running is None, "one step at a time"
        self._running = step

    def finish(self, step: Step) -> Changes:
        """Ends the step: what was assigned is read, what is gone is not owned any more."""
        assert self._running is step, "it was not begun"
        self._running = None
        self._lost_in_step.clear()
        released = set()
        for where in step.partitions:
            if self._stages.get(where) is not _STAGES[step.kind]:
                continue  # lost meanwhile
            if step.kind is Kind.ASSIGNED:
                self._stages[where] = _Stage.READ
                released.add(where)
            else:
                del self._stages[where]
        changes = self._settle()
        return Changes(
            opening=changes.opening,
            forgotten=changes.forgotten,
            revoked=changes.revoked,
            released=frozenset(released) - changes.revoked,
        )

    def _settle(self) -> Changes:
        """Moves partitions to the stages that follow from what is wanted, but for those of the running step."""
        running = self._running.partitions if self._running else NONE
        forgotten, revoked = set(), set()
        for where, stage in list(self._stages.items()):
            if where in self._wanted or where in running:
                continue
            if stage in (_Stage.OPENING, _Stage.OPENED):
                del self._stages[where]
                forgotten.add(where)
            elif stage is _Stage.READ:
                self._stages[where] = _Stage.REVOKED
                revoked.add(where)
        opening = self._wanted - self._stages.keys() - running
        self._stages.update(dict.fromkeys(opening, _Stage.OPENING))
        return Changes(opening=opening, forgotten=frozenset(forgotten), revoked=frozenset(revoked))
