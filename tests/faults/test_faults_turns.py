"""Nemeses have their turns, are held, undone in time, and written down."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.faults import history as h
from tests.faults import nemeses, nemesis
from tests.faults.fleet import Fleet
from tests.faults.nemeses import network, store
from tests.faults.nemesis import Deed, Faults, NotHealed, NotPossible, by_turns, torment

PATIENCE_S = 60
"""Until what must come is given up: no duration is tested by it."""


class Played:
    """Nemeses of this test alone, and the history they leave."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._path = tmp_path / "history.jsonl"
        self.fleet = Fleet(tmp_path, h.Recorder(self._path))
        self.faults = Faults()
        monkeypatch.setattr(nemesis, "NEMESES", {})
        monkeypatch.setattr(nemesis, "HOLD_S", {})
        monkeypatch.setattr(nemesis, "PAUSE_S", (0.0, 0.01))

    async def torment(self, seconds: float, seed: int = 1) -> list[h.Fault]:
        rng = random.Random(seed)
        try:
            await torment(self.fleet, rng, list(nemesis.NEMESES), seconds, self.fleet.recorder, self.faults)
        finally:
            self.fleet.recorder.close()
        return self._history()

    async def turns(self, count: int) -> list[h.Fault]:
        """As `torment`, until so many have had a turn: how many fit into a second says the machine."""
        tormenting = asyncio.create_task(self.torment(PATIENCE_S))
        while len(self.faults.done) < count and not tormenting.done():
            await asyncio.sleep(0.01)
        tormenting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await tormenting
        return self._history()

    def _history(self) -> list[h.Fault]:
        return [event for event in h.read_history(self._path) if isinstance(event, h.Fault)]


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Played:
    return Played(tmp_path, monkeypatch)


def register(name: str, undo_s: float = 0.0, why_not: str = "") -> None:
    @nemesis.nemesis(name, hold_s=(0.01, 0.02))
    async def body(fleet: Fleet, rng: random.Random) -> AsyncIterator[Deed]:
        if why_not:
            raise NotPossible(why_not)
        deed = Deed(f"did {name}")
        try:
            yield deed
        finally:
            await asyncio.sleep(undo_s)
            deed.effect = f"hurt {name}"


async def test_all_have_their_turn_before_one_has_another(played: Played) -> None:
    for name in "abcde":
        register(name)
    await played.turns(12)
    done = played.faults.done
    rounds = [set(done[at : at + 5]) for at in range(0, len(done) - 4, 5)]
    assert all(found == set("abcde") for found in rounds)


async def test_the_history_says_what_was_done_and_what_came_of_it(played: Played) -> None:
    register("a")
    found = await played.torment(0.01)
    assert [(event.name, event.state) for event in found] == [("a", h.BEGINS), ("a", h.OVER)]
    assert played.faults.at_work == set()
    assert found[0].text.startswith("did a, for ")
    assert found[1].text == "undone in 0.0 s; hurt a"


async def test_one_that_is_not_possible_is_skipped_with_its_reason(played: Played) -> None:
    register("a", why_not="no such thing here")
    found = await played.torment(0.01)
    assert {(event.state, event.text) for event in found} == {(h.SKIPPED, "no such thing here")}
    assert played.faults.done == []
    assert played.faults.impossible == {"a": "no such thing here"}


async def test_one_whose_target_has_another_fault_has_its_turn_later(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nemesis, "TWO_AT_ONCE", 1.0)
    for name in ("a", "b"):

        @nemesis.nemesis(name, hold_s=(0.01, 0.02))
        async def body(fleet: Fleet, rng: random.Random) -> AsyncIterator[Deed]:
            with nemesis.all_of(fleet, ["the same"]):
                yield Deed("did it")

    found = await played.turns(8)
    assert {"skipped", "begins"} <= {event.state for event in found}
    assert played.faults.impossible == {}
    counts = [played.faults.done.count(name) for name in ("a", "b")]
    assert min(counts) > 1 and max(counts) - min(counts) <= 1


async def test_one_that_is_not_undone_in_time_fails_the_run(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nemesis, "HEAL_S_MAX", 0.05)
    register("a", undo_s=60)
    with pytest.RaisesGroup(pytest.RaisesExc(NotHealed, match=r"a was not undone within 0\.05 s")):
        await played.torment(0.01)


async def test_the_same_seed_gives_the_same_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        played = Played(tmp_path / str(number), monkeypatch)
        for name in "abcdefgh":
            register(name)
        await played.torment(0.5, seed=7)
        done.append(played.faults.done)
    both = min(map(len, done))  # how many there is time for says the machine
    assert both and done[0][:both] == done[1][:both]


def test_options_have_their_turns(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, h.Recorder(tmp_path / "history.jsonl"))
    rng = random.Random(5)
    drawn = ["".join(by_turns(fleet, rng, "x", "abc") for _ in range(3)) for _ in range(30)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in drawn) and len(set(drawn)) > 1
    fleet.recorder.close()


def test_names_may_have_stars() -> None:
    holes = nemeses.chosen("black-hole-*")
    assert len(holes) == 15 and all(name.startswith("black-hole-") for name in holes)
    assert nemeses.chosen("kill, pause") == ["kill", "pause"]
    assert nemeses.chosen("all") == sorted(nemeses.NEMESES)
    for unknown in ("kil", "kill,no-*", "", ","):
        with pytest.raises(ValueError, match="unknown nemesis"):
            nemeses.chosen(unknown)


def test_each_nemesis_has_a_test_that_it_bites() -> None:
    """By its name, or with its family."""
    texts = [path.read_text() for path in Path(__file__).parent.glob("test_faults_*.py")]
    families = {f"black-hole-{source}-{target}" for source, target in network.BLACK_HOLES} | store.FAULTS.keys()
    named = {name for name in nemeses.NEMESES if any(f'"{name}"' in text for text in texts)}
    assert nemeses.NEMESES.keys() - named - families == set()
    assert any('parametrize("name", HOLES)' in text for text in texts)
    assert any("sorted(nemeses.store.FAULTS)" in text for text in texts)
