"""Python processes in which only the base dependencies can be imported, as after a plain `pip install .`."""

import functools
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
OURS = {Path(path).name for path in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]}
# Run before all else: what this environment has beyond the base dependencies is not found.
REFUSE = """
import sys
from importlib.machinery import PathFinder


class BareFinder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        parts = name.split(".")
        known = name in NAMESPACES or {parts[0], ".".join(parts[:2])} & ALLOWED
        return super().find_spec(name, path, target) if known else None


sys.meta_path[:] = [BareFinder if finder is PathFinder else finder for finder in sys.meta_path]
"""


@functools.cache
def base_distributions() -> frozenset[str]:
    """Returns the names of the distributions that the bare wheel requires, and those that these require."""
    found: set[str] = set()
    left = [*PROJECT["project"]["dependencies"]]
    while left:
        requirement = Requirement(left.pop())
        name = canonicalize_name(requirement.name)
        if name not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            found.add(name)
            left += distribution(name).requires or []
    return frozenset(found)


def modules_of(distributions: Iterable[str]) -> tuple[set[str], set[str]]:
    """Returns the names under which these distributions are imported, and the namespaces in which some of them are."""
    files = [file for name in distributions for file in distribution(name).files or ()]
    files = [file for file in files if file.suffix in (".py", ".so")]
    packages = {file.parts[0] for file in files if file.parts[1:] == ("__init__.py",)}
    packages |= {file.name.partition(".")[0] for file in files if len(file.parts) == 1}
    inside = {file.parts[:2] for file in files if len(file.parts) > 1 and file.parts[0] not in packages}
    return packages | {".".join(parts).partition(".py")[0] for parts in inside}, {top for top, _ in inside}


def bare(source: str, *arguments: str) -> list[str]:
    """Returns the command that runs `source` with the base dependencies alone."""
    names, namespaces = modules_of(base_distributions())
    allowed = names | OURS | sys.stdlib_module_names
    return [sys.executable, "-c", f"ALLOWED, NAMESPACES = {allowed!r}, {namespaces!r}\n{REFUSE}\n{source}", *arguments]
