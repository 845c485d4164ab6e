"""State of the test process that all tests share, the order of files, and what a run left out."""

from collections.abc import Generator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
from shruntime.signals import restore_sigint

from tests.quick import closed_doors

# Every process of a test inherits it. The tests' own workers (pytest -n) load this file, too.
restore_sigint()

LEFT_TO_TEST_ALL = ("integration", "long")
_LEFT_OUT = pytest.StashKey[int]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests come first, so that no worker of `pytest -n` begins one when the others are done."""
    long = {item.path for item in items if item.get_closest_marker("long")}
    items.sort(key=lambda item: item.path not in long)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    with closed_doors() if item.get_closest_marker("quick") else nullcontext():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    with closed_doors() if item.get_closest_marker("quick") else nullcontext():
        yield


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    for item in items:
        if any(item.get_closest_marker(name) for name in LEFT_TO_TEST_ALL):
            item.config.stash[_LEFT_OUT] = item.config.stash.get(_LEFT_OUT, 0) + 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a worker of `pytest -n`
        session.config.workeroutput["left_out"] = session.config.stash.get(_LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Takes over the count of a worker that ends: all have collected the same."""
    output = getattr(node, "workeroutput", {})  # none if it crashed
    node.config.stash[_LEFT_OUT] = max(node.config.stash.get(_LEFT_OUT, 0), output.get("left_out", 0))


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if count := terminalreporter.config.stash.get(_LEFT_OUT, 0):
        tests = f"{count} test" if count == 1 else f"{count} tests"
        terminalreporter.write_line(f"left out: {tests} of whole services, or long; make test-all runs them, too")
