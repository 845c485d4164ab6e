"""One thing has one definition: limits, keys and ack levels are those of shproto, integer bounds those of shformat."""

from collections.abc import Mapping

import pytest

from tests.structure.modules import Modules, our_modules, parsed

pytestmark = pytest.mark.quick

HOMES = ("shproto.acks", "shproto.keys", "shproto.limits", "shproto.model")
# Of shformat.limits; the rest of it is the format's own.
BOUNDS = ("INT64_MAX", "INT64_MIN", "UINT32_MAX")


def vocabulary(modules: Modules) -> Mapping[str, str]:
    """Returns the module that defines each shared name."""
    shared = {name: home for home in HOMES for name, _ in modules[home].defines if not name.startswith("_")}
    return shared | dict.fromkeys(BOUNDS, "shformat.limits")


def own_definitions(modules: Modules, shared: Mapping[str, str]) -> list[str]:
    """Returns definitions of a shared name outside of its home; a leading underscore makes no other name of it."""
    return [
        f"{module.name}:{line} defines {name} of {shared[name.lstrip('_')]}"
        for module in modules.values()
        for name, line in module.defines
        if name.lstrip("_") in shared and module.name != shared[name.lstrip("_")]
    ]


def test_shared_names_are_defined_once() -> None:
    modules = our_modules()
    assert not (found := own_definitions(modules, vocabulary(modules))), "\n".join(found)


def test_every_home_shares_something() -> None:
    modules = our_modules()
    assert set(HOMES) <= set(vocabulary(modules).values())
    assert {name for name, _ in modules["shformat.limits"].defines} >= set(BOUNDS)


def test_a_planted_definition_is_seen() -> None:
    shared = {"NAME_LENGTH_MAX": "p.limits", "RangeKey": "p.keys", "Acks": "p.acks"}
    planted = {
        "p.limits": "NAME_LENGTH_MAX = 249",
        "q.a": "_NAME_LENGTH_MAX: int = 249",
        "q.b": "from typing import NamedTuple\nclass RangeKey(NamedTuple):\n    partition: int",
        "q.c": "FIRST, NAME_LENGTH_MAX = 1, 2",
        "q.d": "from p.limits import NAME_LENGTH_MAX\ndef f():\n    return NAME_LENGTH_MAX",
    }
    assert own_definitions(parsed(planted), shared) == [
        "q.a:1 defines _NAME_LENGTH_MAX of p.limits",
        "q.b:2 defines RangeKey of p.keys",
        "q.c:1 defines NAME_LENGTH_MAX of p.limits",
    ]
