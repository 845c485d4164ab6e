"""Consumer groups without a database: the target is balanced and sticky, the hand-over never overlaps."""

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shproto.errors import IllegalGeneration, UnknownMember
from streamhouse_coordinator.core.groups import (
    Group,
    available,
    check_commit,
    name_of,
    outdated,
    owned_after,
    rebalance,
    split_name,
)

pytestmark = pytest.mark.quick


def names(topic: str, *numbers: int) -> frozenset[str]:
    return frozenset(name_of(topic, number) for number in numbers)


def test_a_first_member_gets_all_and_a_second_one_half() -> None:
    first = rebalance({"a": {"t"}}, {"t": 4}, {})
    assert first == {"a": ["t:0", "t:1", "t:2", "t:3"]}
    assert rebalance({"a": {"t"}, "b": {"t"}}, {"t": 4}, first) == {"a": ["t:0", "t:1"], "b": ["t:2", "t:3"]}


def test_partitions_are_in_the_order_of_numbers() -> None:
    assert rebalance({"a": {"t"}}, {"t": 11}, {})["a"][-2:] == ["t:9", "t:10"]


def test_who_reads_little_gets_it_and_the_others_even_it_out() -> None:
    target = rebalance({"a": {"t", "u"}, "b": {"u"}}, {"t": 2, "u": 4}, {})
    assert {member: len(owned) for member, owned in target.items()} == {"a": 3, "b": 3}
    assert all(split_name(name)[0] == "u" for name in target["b"])


members = st.dictionaries(
    st.sampled_from("abcdef"), st.frozensets(st.sampled_from(["t", "u", "v"]), min_size=1), min_size=1
)
partitions = st.dictionaries(st.sampled_from(["t", "u", "v"]), st.integers(1, 9))


@given(members, members, partitions)
def test_targets(
    before: Mapping[str, frozenset[str]], after: Mapping[str, frozenset[str]], counts: dict[str, int]
) -> None:
    previous = rebalance(before, counts, {})
    target = rebalance(after, counts, previous)
    given_out = [name for owned in target.values() for name in owned]
    read = {topic for topics in after.values() for topic in topics if topic in counts}
    assert sorted(given_out) == sorted(name_of(topic, n) for topic in read for n in range(counts[topic]))
    for member, owned in target.items():
        assert {split_name(name)[0] for name in owned} <= after[member]
        for name in owned:
            others = [len(target[other]) for other in after if split_name(name)[0] in after[other]]
            assert len(owned) - min(others) <= 1, "it could have been evened out"
    assert rebalance(after, counts, target) == target, "nothing changes without a cause"


@given(st.integers(1, 30), st.integers(1, 6))
def test_a_member_that_leaves_moves_only_its_own(count: int, size: int) -> None:
    topics = {f"m{number}": {"t"} for number in range(size + 1)}
    before = rebalance(topics, {"t": count}, {})
    del topics["m0"]
    after = rebalance(topics, {"t": count}, before)
    assert all(set(before[member]) <= set(after[member]) for member in topics)


many = st.lists(st.sampled_from("abcdefghij"), min_size=1, unique=True)
counts_of_topics = st.fixed_dictionaries({"t": st.integers(1, 40), "u": st.integers(1, 40)})


def moved(
    previous: Mapping[str, list[str]], target: Mapping[str, list[str]], existing: set[str]
) -> dict[str, set[str]]:
    """What members that stay lose although it still exists."""
    return {member: (set(previous.get(member, ())) & existing) - set(target[member]) for member in target}


@given(st.lists(st.tuples(many, counts_of_topics), min_size=2, max_size=5))
def test_as_few_partitions_move_as_balance_allows(rounds: list[tuple[list[str], dict[str, int]]]) -> None:
    """Members come and go, several at once, and topics with them; all read the same topics. Balanced is: nobody has
    two more than another. Of what a member had it can keep one more than the others' share only where that does not
    come out even, so whatever it had above that has to go, and nothing else may."""
    previous: dict[str, list[str]] = {}
    for members_now, counts in rounds:
        target = rebalance({member: {"t", "u"} for member in members_now}, counts, previous)
        existing = {name_of(topic, number) for topic, count in counts.items() for number in range(count)}
        share, over = divmod(len(existing), len(members_now))
        had = sorted((len(set(previous.get(member, ())) & existing) for member in members_now), reverse=True)
        needed = sum(max(0, kept - share - (rank < over)) for rank, kept in enumerate(had))
        assert sum(map(len, moved(previous, target, existing).values())) == needed
        previous = target


@given(members, members, partitions)
def test_two_members_never_exchange_partitions_of_a_topic(
    before: Mapping[str, frozenset[str]], after: Mapping[str, frozenset[str]], counts: dict[str, int]
) -> None:
    previous = rebalance(before, counts, {})
    target = rebalance(after, counts, previous)
    stay = set(before) & set(after)
    owner = {name: member for member, owned in target.items() for name in owned}
    moves = {
        (member, owner[name], split_name(name)[0])
        for member in stay
        for name in set(previous[member]) - set(target[member])
        if owner.get(name) in stay
    }
    assert not {(there, here, topic) for here, there, topic in moves} & moves


@pytest.mark.long
@given(st.data())
def test_no_partition_is_ever_worked_on_by_two(data: st.DataObject) -> None:
    """Members come, go, speak and answer late, in any order; what they were given and did not yet let go never
    overlaps."""
    group, working = Group(name="g", generation=0), dict[str, frozenset[str]]()
    for _ in range(data.draw(st.integers(1, 25))):
        member = data.draw(st.sampled_from("abcd"))
        joins = member not in group.topics
        if joins or data.draw(st.booleans()) is False:
            topics = dict(group.topics)
            if joins:
                topics[member] = frozenset({"t"})
            else:
                del topics[member]
                working.pop(member, None)
            target = {m: frozenset(owned) for m, owned in rebalance(topics, {"t": 5}, group.target).items()}
            owned = {m: o for m, o in group.owned.items() if m in topics}
            group = Group(name="g", generation=group.generation + 1, topics=topics, owned=owned, target=target)
            continue
        reported = working.get(member, frozenset()) & data.draw(
            st.sampled_from([names("t", *range(5)), group.target.get(member, frozenset())])
        )
        assigned, _ = available(group, member)
        after = owned_after(group, member, reported, assigned)
        group = Group(
            name="g",
            generation=group.generation,
            topics=group.topics,
            owned={**group.owned, member: after},
            target=group.target,
        )
        answered = data.draw(st.booleans())
        working[member] = reported | (assigned if answered else frozenset())
        busy = [name for owned in working.values() for name in owned]
        assert len(busy) == len(set(busy))


def test_what_others_hold_is_pending() -> None:
    group = Group(
        name="g",
        generation=2,
        topics={"a": ["t"], "b": ["t"]},
        owned={"a": names("t", 0, 1)},
        target={"a": names("t", 0), "b": names("t", 1)},
    )
    assert available(group, "a") == (names("t", 0), False)
    assert available(group, "b") == (frozenset(), True)
    assert owned_after(group, "a", names("t", 0), names("t", 0)) == names("t", 0)
    assert owned_after(group, "b", names("t", 0), frozenset()) == frozenset(), "nobody owns what it was not given"


def test_targets_are_outdated_when_topics_come_or_go() -> None:
    group = Group(name="g", generation=1, topics={"a": ["t", "u"]}, owned={}, target={"a": names("t", 0)})
    assert not outdated(group, {"t": 1})
    assert outdated(group, {"t": 2})
    assert outdated(group, {"t": 1, "u": 1})
    assert outdated(group, {})


def test_commit_fencing() -> None:
    group = Group(
        name="g",
        generation=3,
        topics={"a": ["t"], "b": ["t"]},
        owned={"a": names("t", 0, 1), "b": names("t", 2)},
        target={"a": names("t", 0), "b": names("t", 1, 2)},
    )
    check_commit(group, "a", 3, names("t", 0, 1))
    check_commit(group, "a", 2, names("t", 0, 1))  # late, but still its own
    check_commit(group, "b", 3, names("t", 2))
    for member, generation, number in (("a", 3, 2), ("a", 2, 2), ("b", 3, 1), ("a", 2, 3), ("", 0, 0)):
        with pytest.raises(IllegalGeneration):
            check_commit(group, member, generation, names("t", number))
    with pytest.raises(UnknownMember):
        check_commit(group, "c", 3, names("t", 0))
    check_commit(Group(name="g", generation=5), "", 0, names("t", 0))
