"""Consumer groups: a sticky, balanced target per generation, and the hand-over between members.

A partition moves in two steps: the target names its new member, but the new member only gets it once the old one no
longer reports it as owned, or is gone. So no two members ever work on the same partition.
"""

import heapq
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from shproto.errors import GroupNotEmpty, IllegalGeneration, UnknownMember

from streamhouse_coordinator.core.tables import LOST, SETTLED, RangeRow

# "topic:partition"; topic names have no colon
TopicPartition = str


def name_of(topic: str, partition: int) -> TopicPartition:
    return f"{topic}:{partition}"


def split_name(name: TopicPartition) -> tuple[str, int]:
    topic, _, partition = name.rpartition(":")
    return topic, int(partition)


def _order(name: TopicPartition) -> tuple[str, int]:
    return split_name(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """`topics`, `owned` and `target` by member id; only members have entries in `topics` and `owned`."""

    name: str
    generation: int
    topics: Mapping[str, Collection[str]] = field(default_factory=dict)
    owned: Mapping[str, frozenset[TopicPartition]] = field(default_factory=dict)
    target: Mapping[str, frozenset[TopicPartition]] = field(default_factory=dict)


# ---- the target


def rebalance(
    topics: Mapping[str, Collection[str]],
    partitions: Mapping[str, int],
    previous: Mapping[str, Collection[TopicPartition]],
) -> dict[str, list[TopicPartition]]:
    """Every partition of a topic somebody reads goes to one member that reads it. Members keep what they had, as far
    as that leaves them within one of each other (where their topics allow).

    `topics`: by member id. `partitions`: their number by topic; topics that do not exist are left out.
    `previous`: the last target.
    """
    readers = {topic: sorted(m for m, wanted in topics.items() if topic in wanted) for topic in partitions}
    free = {name_of(topic, number) for topic in partitions if readers[topic] for number in range(partitions[topic])}
    target: dict[str, set[TopicPartition]] = {member: set() for member in topics}
    for member in sorted(topics):
        own = {name for name in previous.get(member, ()) if name in free and split_name(name)[0] in topics[member]}
        target[member] = own
        free -= own
    kept = {member: frozenset(names) for member, names in target.items()}
    _hand_out(free, readers, target)
    _level(readers, target, kept)
    return {member: sorted(names, key=_order) for member, names in sorted(target.items())}


def _hand_out(
    free: Iterable[TopicPartition], readers: Mapping[str, list[str]], target: dict[str, set[TopicPartition]]
) -> None:
    by_topic: dict[str, list[TopicPartition]] = {}
    for name in sorted(free, key=_order):
        by_topic.setdefault(split_name(name)[0], []).append(name)
    # Topics with few readers first: their partitions have the least choice.
    for topic in sorted(by_topic, key=lambda topic: (len(readers[topic]), topic)):
        loads = [(len(target[member]), member) for member in readers[topic]]
        heapq.heapify(loads)
        for name in by_topic[topic]:
            load, member = loads[0]
            target[member].add(name)
            heapq.heapreplace(loads, (load + 1, member))


def _level(
    readers: Mapping[str, list[str]],
    target: dict[str, set[TopicPartition]],
    kept: Mapping[str, Collection[TopicPartition]],
) -> None:
    """Moves single partitions from the fullest member to the emptiest that reads them, until none is two ahead of one
    that could take over. Always the fullest: taking from one until it is even would take more than its surplus.
    Every move lowers the sum of the squared loads, so it ends."""
    crowds = {topic: tuple(members) for topic, members in readers.items()}
    stacks = {member: _stacks(crowds, names, kept[member]) for member, names in target.items()}
    moved = True
    while moved:  # again, because what is given away by one may be what another could not give to it before
        moved = False
        fullest = [(-len(names), member) for member, names in target.items()]
        heapq.heapify(fullest)
        while fullest:
            load, member = heapq.heappop(fullest)
            if -load != len(target[member]) or not (stack := stacks[member]):
                continue  # it has another entry, or nothing
            found = [(min((len(target[other]), other) for other in crowd), crowd) for crowd in stack]
            (least, taker), crowd = min(found)
            if -load - least < 2:
                continue
            name = stack[crowd].pop()
            if not stack[crowd]:
                del stack[crowd]
            stacks[taker].setdefault(crowd, []).append(name)
            target[member].remove(name)
            target[taker].add(name)
            heapq.heappush(fullest, (load + 1, member))
            heapq.heappush(fullest, (-least - 1, taker))
            moved = True


def _stacks(
    crowds: Mapping[str, tuple[str, ...]], names: Collection[TopicPartition], kept: Collection[TopicPartition]
) -> dict[tuple[str, ...], list[TopicPartition]]:
    """A member's partitions by who could take them, the first to go last: what it did not have before."""
    stacks: dict[tuple[str, ...], list[TopicPartition]] = {}
    for name in sorted(names, key=lambda name: (name not in kept, _order(name))):
        stacks.setdefault(crowds[split_name(name)[0]], []).append(name)
    return stacks


def outdated(group: Group, partitions: Mapping[str, int]) -> bool:
    """Whether topics were created or deleted since the target was made."""
    read = {topic for wanted in group.topics.values() for topic in wanted if topic in partitions}
    wanted = {name_of(topic, number) for topic in read for number in range(partitions[topic])}
    return wanted != {name for names in group.target.values() for name in names}


# ---- hand-over


def available(group: Group, member: str) -> tuple[frozenset[TopicPartition], bool]:
    """What `member` may work on now, and whether more is coming that others have not let go of yet."""
    target = group.target.get(member, frozenset())
    held = frozenset(name for other, names in group.owned.items() if other != member for name in names)
    return target - held, bool(target & held)


def owned_after(
    group: Group, member: str, reported: frozenset[TopicPartition] | None, assigned: frozenset[TopicPartition]
) -> frozenset[TopicPartition]:
    """What `member` counts as owning from now on: what it still works on of what it was given, and what it is given
    now. `reported`: None when it has not spoken since."""
    before = group.owned.get(member, frozenset())
    return (before if reported is None else before & reported) | assigned


# ---- commits


def check_commit(group: Group, member: str, generation: int, names: Iterable[TopicPartition]) -> None:
    """Raises UnknownMember, or IllegalGeneration when another member works on a partition, or may be about to."""
    if not member and not generation:
        if group.topics:
            raise IllegalGeneration(
                f"group {group.name!r} has members; only they commit", generation=generation, current=group.generation
            )
        return
    if member not in group.topics:
        raise UnknownMember(
            f"group {group.name!r} has no member {member!r}; join again", group=group.name, member_id=member
        )
    own = group.owned.get(member, frozenset())
    held = {name for other, others in group.owned.items() if other != member for name in others}
    for name in names:
        if name in held or (generation != group.generation and name not in own):
            raise IllegalGeneration(
                f"{name} is not {member!r}'s to commit in generation {generation} of group {group.name!r}",
                generation=generation,
                current=group.generation,
                partition=name,
            )


# ---- for operators


def state_of(group: Group) -> str:
    """empty | rebalancing (somebody has to take or to let go) | stable"""
    if not group.topics:
        return "empty"
    nothing: frozenset[TopicPartition] = frozenset()
    settled = all(group.owned.get(member, nothing) == group.target.get(member, nothing) for member in group.topics)
    return "stable" if settled else "rebalancing"


def check_empty(group: Group, what: str) -> None:
    """Raises GroupNotEmpty: members would go on at their own offsets, and commit them."""
    if group.topics:
        raise GroupNotEmpty(
            f"group {group.name!r} has {len(group.topics)} member(s); stop the consumers, then {what}",
            group=group.name,
            members=len(group.topics),
        )


def records_before(ranges: Iterable[RangeRow], offset: int) -> tuple[int, bool]:
    """Records from `offset` on that lie in these ranges of a partition, and whether there can be no more: an
    unsettled one may hold some that are not registered. Offsets inside a range have no gaps."""
    records, exact = 0, True
    for row in ranges:
        end = row.end_offset if row.status == SETTLED and row.end_offset is not None else row.registered_end
        records += max(0, end - max(offset, row.start_offset))
        exact = exact and (row.status in (SETTLED, LOST) or offset >= row.limit_offset)
    return records, exact
