"""What may be installed fits together, also for a pip that does not search long."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TESTED = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
EVERYTHING = [
    Requirement(text)
    for extra, texts in {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}.items()
    if extra != "peers"  # beside which ours is measured
    for text in texts
    if not text.startswith("streamhouse[")
]
# Released together, pinning each other, and now and then incompletely.
FAMILY = [
    requirement
    for requirement in map(Requirement, PROJECT["optional-dependencies"]["server"])
    if requirement.name.startswith("opentelemetry-")
]


def test_opentelemetry_is_bounded_by_the_versions_that_were_tested() -> None:
    assert FAMILY
    for requirement in FAMILY:
        highest = [specifier.version for specifier in requirement.specifier if specifier.operator == "<="]
        assert highest == [TESTED[requirement.name]], f"{requirement}: move the bound and constraints.txt together"


def test_the_opentelemetry_versions_allowed_are_of_one_release() -> None:
    """1.45.1 and 0.66b1: stable and beta packages of a release have the same last number."""
    last = {re.split(r"[.b]", TESTED[requirement.name])[-1] for requirement in FAMILY}
    assert len(last) == 1, {requirement.name: TESTED[requirement.name] for requirement in FAMILY}


def test_every_dependency_allows_the_version_that_was_tested() -> None:
    names = {name.lower().replace("_", "-"): Version(version) for name, version in TESTED.items()}
    for requirement in EVERYTHING:
        tested = names[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(tested, prereleases=True), f"{requirement}: tested with {tested}"
