"""Nothing is left out: every link can be silent each way, and the page names every nemesis and every anomaly."""

import random
import re
from pathlib import Path

import pytest

from tests.faults import checks, nemeses
from tests.faults.fleet import POSTGRES_PLACES, SERVICES, WAYS
from tests.faults.nemeses import network
from tests.faults.proxy import BOTH, Direction

pytestmark = pytest.mark.quick

PAGE = (Path(__file__).parents[2] / "docs" / "testing-faults.md").read_text()
NAME = re.compile(r"`([a-z0-9-]+)`")
HOLE = "black-hole-A-B"


def rows(section: str) -> list[list[str]]:
    """Returns the cells of the first table below a heading, without its own."""
    text = PAGE.partition(f"## {section}\n")[2].partition("\n## ")[0]
    lines = re.split(r"\n(?!\|)", text[text.index("|") :])[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def reached(source: str, target: str) -> set[str]:
    """Returns the links that a black hole hits in one turn or another."""
    return {way for seed in range(200) for way in network.hole_links(random.Random(seed), source, target)}


def test_every_link_can_be_a_black_hole_there_and_back_and_both_ways() -> None:
    holes = [pair for pair in network.BLACK_HOLES if f"black-hole-{pair[0]}-{pair[1]}" in nemeses.NEMESES]
    assert set[str]().union(*(reached(*pair) for pair in holes)) == set(WAYS)
    assert {frozenset(ways) for ways in network.DIRECTIONS} == {
        frozenset({Direction.UP}), frozenset({Direction.DOWN}), frozenset(BOTH)
    }  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_link_can_be_silent_alone(way: str) -> None:
    """Not only with all others of its kind. The places of PostgreSQL are silent together: one has the primary."""
    source, _, target = way.partition(">")
    targets = POSTGRES_PLACES if target in POSTGRES_PLACES else (target,)
    together = {f"{source}>{one}" for one in targets}
    assert any(
        set(network.hole_links(random.Random(seed), *pair)) == together
        for pair in network.BLACK_HOLES
        for seed in range(400)
    )


def test_every_service_has_a_link_of_its_own_to_whatever_it_talks_to() -> None:
    assert len(set(WAYS)) == len(WAYS)
    assert all(any(name in way.split(">") for way in WAYS) for name in SERVICES)


def test_the_page_has_every_nemesis_and_how_long_it_is_held() -> None:
    held = {name: cells[2] for cells in rows("Nemeses") for name in NAME.findall(cells[0].replace("A-B", "a-b"))}
    holes = {f"black-hole-{source}-{target}" for source, target in network.BLACK_HOLES}
    (of_holes,) = {nemeses.held(name) for name in holes}
    expected = {name: nemeses.held(name) for name in nemeses.NEMESES.keys() - holes}
    assert held == expected | {HOLE.replace("A-B", "a-b"): of_holes}


def test_the_page_has_every_black_hole() -> None:
    text = PAGE.partition("Black holes are there for ")[2].partition(". A silent link")[0]
    named = set(re.findall(r"\b[a-z]+-[a-z0-9]+\b", re.sub(r"\(.*?\)", "", text, flags=re.DOTALL)))
    assert named == {f"{source}-{target}" for source, target in network.BLACK_HOLES}


def test_the_page_has_every_anomaly() -> None:
    source = Path(checks.__file__).read_text()
    found = set(re.findall(r'Anomaly\(\s*"([a-z-]+)"', source))
    named = {name for cells in rows("What the checker finds") for name in NAME.findall(cells[0])}
    assert len(found) > 10 and named == found
