"""`docs/client.md`: the answers of `Admin` that it lists have those fields."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import streamhouse.cluster
import streamhouse.core.lag
import streamhouse.group_admin

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "client.md").read_text()
SECTION = PAGE.partition("\n### Answers\n")[2].partition("\n## ")[0]

pytestmark = pytest.mark.quick

MODULES = (streamhouse.cluster, streamhouse.group_admin, streamhouse.core.lag)


def test_every_answer_is_listed_with_its_fields() -> None:
    answers = {
        name: [field.name for field in dataclasses.fields(found)]
        for module in MODULES
        for name, found in inspect.getmembers(module, dataclasses.is_dataclass)
        if found.__module__ == module.__name__
    }
    listed = {
        row[1]: re.findall(r"`(\w+)`", row[2])
        for row in re.findall(r"^\|([^|]*)\| `(\w+)` \|([^|]*)\|", SECTION, re.MULTILINE)
    }
    assert listed == answers


def test_the_methods_of_the_answers_are_there() -> None:
    methods = [
        name for row in re.findall(r"^\|([^|]*)\|", SECTION, re.MULTILINE) for name in re.findall(r"`([\w.]+)`", row)
    ]
    assert len(methods) > 10
    for name in methods:
        client, _, method = name.rpartition(".")
        assert hasattr(getattr(streamhouse, client or "Admin"), method), name
