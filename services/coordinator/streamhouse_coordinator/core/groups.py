"""Consumer groups: a sticky, balanced target per generation, and the hand-over between members. Pure.

Invariant: no two members ever work on the same partition. A partition moves in two steps: the target names the new
member, which gets the partition only when the old member no longer owns the partition by its reports, or has left.
"""

import heapq
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from shproto.errors import GroupNotEmpty, IllegalGeneration, UnknownMember

from streamhouse_coordinator.core.tables import LOST, SETTLED, RangeRow

# "topic:partition"; topic names have no colon.
PartitionName = str


def name_of(topic: str, partition: int) -> PartitionName:
    """Returns the name of a partition in assignments."""
    return f"{topic}:{partition}"


def split_name(name: PartitionName) -> tuple[str, int]:
    """Returns the (topic, partition) of a name."""
    topic, _, partition = name.rpartition(":")
    return topic, int(partition)


def _order(name: PartitionName) -> tuple[str, int]:
    return split_name(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A consumer group. `topics`, `owned` and `target` are by member id; only members have entries in `topics` and
    `owned`."""

    name: str
    generation: int
    topics: Mapping[str, Collection[str]] = field(default_factory=dict)
    owned: Mapping[str, frozenset[PartitionName]] = field(default_factory=dict)
    target: Mapping[str, frozenset[PartitionName]] = field(default_factory=dict)


# ---- the target


def rebalance(
    topics: Mapping[str, Collection[str]],
    partitions: Mapping[str, int],
    previous: Mapping[str, Collection[PartitionName]],
) -> dict[str, list[PartitionName]]:
    """Returns a target that gives every partition of a subscribed topic to a single member subscribed to the topic.
    Members keep their partitions as far as that leaves their numbers within 1 of each other (where their topics allow).

    `topics`: by member id. `partitions`: number of partitions by topic; topics that do not exist are left out.
    `previous`: the last target.
    """
    readers = {topic: sorted(m for m, wanted in topics.items() if topic in wanted) for topic in partitions}
    free = {name_of(topic, number) for topic in partitions if readers[topic] for number in range(partitions[topic])}
    target: dict[str, set[PartitionName]] = {member: set() for member in topics}
    for member in sorted(topics):
        # Kept before anything is handed out: a partition that stays with its member is read without a pause.
        own = {name for name in previous.get(member, ()) if name in free and split_name(name)[0] in topics[member]}
        target[member] = own
        free -= own
    kept = {member: frozenset(names) for member, names in target.items()}
    _hand_out(free, readers, target)
    _level(readers, target, kept)
    return {member: sorted(names, key=_order) for member, names in sorted(target.items())}


def _hand_out(
    free: Iterable[PartitionName], readers: Mapping[str, list[str]], target: dict[str, set[PartitionName]]
) -> None:
    by_topic: dict[str, list[PartitionName]] = {}
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
    target: dict[str, set[PartitionName]],
    kept: Mapping[str, Collection[PartitionName]],
) -> None:
    """Moves single partitions from the fullest member to the emptiest that reads their topic, until no member is two
    ahead of another that could take over. Always from the fullest: emptying a single member to the end would take more
    than the surplus. Ends, because every move lowers the sum of the squared loads."""
    crowds = {topic: tuple(members) for topic, members in readers.items()}
    stacks = {member: _stacks(crowds, names, kept[member]) for member, names in target.items()}
    moved = True
    while moved:  # again: a partition that was given away may fill a gap that was out of reach before
        moved = False
        fullest = [(-len(names), member) for member, names in target.items()]
        heapq.heapify(fullest)
        while fullest:
            load, member = heapq.heappop(fullest)
            if -load != len(target[member]) or not (stack := stacks[member]):
                continue  # the member has another entry, or no partitions
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
    crowds: Mapping[str, tuple[str, ...]], names: Collection[PartitionName], kept: Collection[PartitionName]
) -> dict[tuple[str, ...], list[PartitionName]]:
    """Returns a member's partitions by the members that could take them. Partitions that are new to the member are last
    in the lists, and so move first."""
    stacks: dict[tuple[str, ...], list[PartitionName]] = {}
    for name in sorted(names, key=lambda name: (name not in kept, _order(name))):
        stacks.setdefault(crowds[split_name(name)[0]], []).append(name)
    return stacks


def outdated(group: Group, partitions: Mapping[str, int]) -> bool:
    """Returns True if topics were created or deleted since the target was made."""
    read = {topic for wanted in group.topics.values() for topic in wanted if topic in partitions}
    wanted = {name_of(topic, number) for topic in read for number in range(partitions[topic])}
    return wanted != {name for names in group.target.values() for name in names}


# ---- hand-over


def available(group: Group, member: str) -> tuple[frozenset[PartitionName], bool]:
    """Returns the partitions that `member` may work on now, and True if others have not released all of the target
    yet."""
    target = group.target.get(member, frozenset())
    # By the reports of the owners, not the target: a member works on a partition until it says otherwise, or has left.
    held = frozenset(name for other, names in group.owned.items() if other != member for name in names)
    return target - held, bool(target & held)


def owned_after(
    group: Group, member: str, reported: frozenset[PartitionName] | None, assigned: frozenset[PartitionName]
) -> frozenset[PartitionName]:
    """Returns the partitions that `member` counts as owning from now on: its earlier partitions that it still works on,
    and the newly assigned ones. `reported`: None if the member has not reported since."""
    before = group.owned.get(member, frozenset())
    return (before if reported is None else before & reported) | assigned


# ---- commits


def check_commit(group: Group, member: str, generation: int, names: Iterable[PartitionName]) -> None:
    """Checks that a member may commit offsets of these partitions. Raises UnknownMember, or IllegalGeneration if
    another member works on a partition, or may be about to."""
    # Commits of tools and of consumers that choose their partitions themselves, as with Kafka.
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
        # In a new generation a member may still commit the partitions that it has not released.
        if name in held or (generation != group.generation and name not in own):
            raise IllegalGeneration(
                f"{name} is not {member!r}'s to commit in generation {generation} of group {group.name!r}",
                generation=generation,
                current=group.generation,
                partition=name,
            )


# ---- for operators


def state_of(group: Group) -> str:
    """Returns empty | rebalancing (a member has to take or release partitions) | stable."""
    if not group.topics:
        return "empty"
    nothing: frozenset[PartitionName] = frozenset()
    settled = all(group.owned.get(member, nothing) == group.target.get(member, nothing) for member in group.topics)
    return "stable" if settled else "rebalancing"


def check_empty(group: Group, what: str) -> None:
    """Checks that the group has no members: members would continue at their own offsets, and commit them. Raises
    GroupNotEmpty."""
    if group.topics:
        raise GroupNotEmpty(
            f"group {group.name!r} has {len(group.topics)} member(s); stop the consumers, then {what}",
            group=group.name,
            members=len(group.topics),
        )


def records_before(ranges: Iterable[RangeRow], offset: int) -> tuple[int, bool]:
    """Returns the number of records from `offset` on in these ranges of a partition, and True if there cannot be more:
    a range that is not settled may have records that are not registered. Offsets inside a range have no gaps."""
    records, exact = 0, True
    for row in ranges:
        end = row.end_offset if row.status == SETTLED and row.end_offset is not None else row.registered_end
        records += max(0, end - max(offset, row.start_offset))
        exact = exact and (row.status in (SETTLED, LOST) or offset >= row.limit_offset)
    return records, exact
