"""Stages of a consumer's partitions: assigned, read, revoked or lost, and the next callback of the application.

Owns: the stage of every partition. Does not own: the assignment, cursors, callbacks, messages to the group.
Invariants: a partition is owned from when it is assigned until its REVOKED step is finished, so that no other member
begins on it before. Steps come one at a time. For each partition ASSIGNED alternates with REVOKED or LOST, and a
partition that comes back is opened only after the step that took it away is finished.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import Enum, auto

from streamhouse.records import TopicPartition

Partitions = frozenset[TopicPartition]
NONE: Partitions = frozenset()


class _Stage(Enum):
    OPENING = auto()  # its start position is being looked up
    OPENED = auto()  # its start position is known; on_assigned is still to be called
    READ = auto()
    REVOKED = auto()  # not read any more, but still owned
    LOST = auto()  # another member may own it already


class Kind(Enum):
    """Kinds of steps, named after the callbacks that report them."""

    ASSIGNED = auto()
    REVOKED = auto()
    LOST = auto()


# In the order in which steps are due: partitions that go come before new partitions.
_STAGES = {Kind.LOST: _Stage.LOST, Kind.REVOKED: _Stage.REVOKED, Kind.ASSIGNED: _Stage.OPENED}


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """Partitions that the application is notified of in one call."""

    kind: Kind
    partitions: Partitions


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """Work that a change leaves for the caller. opening: look up the start positions. forgotten: stop that, and drop
    opened partitions. revoked: stop reading, and keep the positions. lost: stop reading. released: begin to read."""

    opening: Partitions = NONE
    forgotten: Partitions = NONE
    revoked: Partitions = NONE
    lost: Partitions = NONE
    released: Partitions = NONE


class HandOver:
    """State machine of the partitions' stages: `assign` and `lose` follow the group or the subscription, `opened`
    follows the lookup of start positions; then `begin` and `finish` for each `next_step`. The caller carries out the
    returned changes."""

    def __init__(self) -> None:
        self._assigned: Partitions = NONE
        self._stages: dict[TopicPartition, _Stage] = {}
        self._running: Step | None = None
        self._lost_in_step: set[TopicPartition] = set()  # among the partitions that the running step revokes

    @property
    def owned(self) -> Partitions:
        """Partitions that no other member may begin on."""
        kept = (_Stage.READ, _Stage.REVOKED)
        announcing = self._running.partitions if self._running and self._running.kind is Kind.ASSIGNED else NONE
        return self._assigned.union(
            where
            for where, stage in self._stages.items()
            if stage in kept or (stage is _Stage.OPENED and where in announcing)
        )

    @property
    def running(self) -> Step | None:
        """The step that has begun and is not finished; None if there is none."""
        return self._running

    @property
    def lost(self) -> Partitions:
        """Lost partitions that the application does not know of yet: its positions in them must not be committed, even
        if the partitions have been assigned again."""
        lost = (where for where, stage in self._stages.items() if stage is _Stage.LOST)
        return frozenset(self._lost_in_step).union(lost)

    @property
    def assigned(self) -> Partitions:
        """The partitions of the last assignment."""
        return self._assigned

    @property
    def is_settled(self) -> bool:
        """True if every partition is being opened or read."""
        return self._running is None and set(self._stages.values()) <= {_Stage.OPENING, _Stage.READ}

    @property
    def is_revoking(self) -> bool:
        """True until the steps of all revoked and lost partitions are finished."""
        gone = self._running is not None and self._running.kind is not Kind.ASSIGNED
        return gone or not {_Stage.REVOKED, _Stage.LOST}.isdisjoint(self._stages.values())

    def assign(self, partitions: Iterable[TopicPartition]) -> Changes:
        """Reads these partitions from now on, and no others. Returns the changes that follow."""
        self._assigned = frozenset(partitions)
        return self._settle()

    def adopt(self, partitions: Iterable[TopicPartition], *, announce: bool) -> None:
        """Counts these partitions as assigned and opened; there were none before."""
        self._assigned = frozenset(partitions)
        self._stages = dict.fromkeys(self._assigned, _Stage.OPENED if announce else _Stage.READ)

    def opened(self, partitions: Iterable[TopicPartition], *, announce: bool) -> None:
        """Records that the start positions are known. announce: the application is notified before these partitions are
        read."""
        for where in partitions:
            assert self._stages[where] is _Stage.OPENING, "it was forgotten"
            self._stages[where] = _Stage.OPENED if announce else _Stage.READ

    def lose(self, partitions: Iterable[TopicPartition] | None = None) -> Changes:
        """Ends the ownership of these partitions at once (None: of all partitions, and none is assigned any more):
        another member may own them already, or their topic is gone. Partitions that are still assigned are opened anew.
        Returns the changes that follow."""
        running = self._running.partitions if self._running else NONE
        forgotten, lost = set(), set()
        for where in list(self._stages) if partitions is None else list(partitions):
            stage = self._stages.get(where)
            if stage is _Stage.OPENING or (stage is _Stage.OPENED and where not in running):
                del self._stages[where]
                forgotten.add(where)
            elif stage is _Stage.REVOKED and where in running:
                del self._stages[where]  # the application is being notified that it is gone
                self._lost_in_step.add(where)
                lost.add(where)
            elif stage is not None:
                self._stages[where] = _Stage.LOST
                lost.add(where)
        if partitions is None:
            self._assigned = NONE
        changes = self._settle()
        return Changes(opening=changes.opening, forgotten=frozenset(forgotten), lost=frozenset(lost))

    def next_step(self, kinds: Collection[Kind]) -> Step | None:
        """Returns the due step of one of these kinds; None if no step is due, or a step is running."""
        if self._running is not None:
            return None
        for kind, due in _STAGES.items():
            partitions = frozenset(where for where, stage in self._stages.items() if stage is due)
            if partitions and kind in kinds:
                return Step(kind, partitions)
        return None

    def begin(self, step: Step) -> None:
        """Begins the step that `next_step` has just returned."""
        assert self._running is None, "one step at a time"
        self._running = step

    def finish(self, step: Step) -> Changes:
        """Ends the step: assigned partitions are read, revoked and lost partitions are not owned any more. Returns the
        changes that follow."""
        assert self._running is step, "it was not begun"
        self._running = None
        # The application knows of them now: the callback has returned.
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
        """Moves all partitions except those of the running step to the stage that follows from `_assigned`. Returns the
        changes."""
        running = self._running.partitions if self._running else NONE
        forgotten, revoked = set(), set()
        for where, stage in list(self._stages.items()):
            if where in self._assigned or where in running:
                continue
            if stage in (_Stage.OPENING, _Stage.OPENED):
                del self._stages[where]
                forgotten.add(where)
            elif stage is _Stage.READ:
                self._stages[where] = _Stage.REVOKED
                revoked.add(where)
        opening = self._assigned - self._stages.keys() - running
        self._stages.update(dict.fromkeys(opening, _Stage.OPENING))
        return Changes(opening=opening, forgotten=frozenset(forgotten), revoked=frozenset(revoked))
