"""docs/errors.md lists every error with the status and retriability it really has."""

import ast
import re
from pathlib import Path

import pytest
from shproto.errors import InvalidArgument, StreamHouseError

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "errors.md"


def test_the_page_lists_every_error() -> None:
    rows = re.findall(r"^\| ([A-Z_]+) \| ([A-Z_]+) \| (yes|no) \|", PAGE.read_text(), re.M)
    documented = {reason: (status, retriable == "yes") for reason, status, retriable in rows}
    actual = {reason: (cls.status.name, cls.retriable) for reason, cls in StreamHouseError.registry.items()}
    assert documented == actual


def details_sent() -> dict[str, set[str]]:
    """By class name: the details that any code of ours gives to an error of that class, or adds to one it passes on."""
    sent: dict[str, set[str]] = {cls.__name__: set() for cls in StreamHouseError.registry.values()}
    added: set[str] = set()
    for path in [path for part in ("libs", "services", "client", "cli") for path in (ROOT / part).rglob("*.py")]:
        if "tests" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and (name := _name_of(node.func)) in sent:
                sent[name] |= {keyword.arg for keyword in node.keywords if keyword.arg}
            if isinstance(node, ast.Assign):
                added |= {name for target in node.targets if (name := _detail_of(target))}
    return {name: details | added for name, details in sent.items()}


def _name_of(called: ast.expr) -> str:
    """The class in `Unavailable(...)` and `errors.Unavailable(...)`; else nothing."""
    if isinstance(called, ast.Attribute):
        return called.attr
    return called.id if isinstance(called, ast.Name) else ""


def _detail_of(target: ast.expr) -> str:
    """The name in `error.details["name"] = ...`, of an error whose class is not seen here; else nothing."""
    if not (isinstance(target, ast.Subscript) and isinstance(target.value, ast.Attribute)):
        return ""
    named = target.slice
    is_detail = target.value.attr == "details" and isinstance(named, ast.Constant)
    return str(named.value) if is_detail and isinstance(named, ast.Constant) else ""


def test_the_page_names_no_details_that_nobody_sends() -> None:
    by_class = details_sent()
    sent = {reason: by_class[cls.__name__] for reason, cls in StreamHouseError.registry.items()}
    rows = re.findall(r"^\| ([A-Z_]+) \| [A-Z_]+ \| (?:yes|no) \| .* \| ?(.*?) ?\|$", PAGE.read_text(), re.M)
    assert len(rows) == len(sent)
    for reason, details in rows:
        named = set(re.findall(r"[a-z_]+", re.sub(r"\(.*?\)| or ", " ", details)))
        assert named <= sent[reason], f"{reason}: {named - sent[reason]}"


def test_round_trip_keeps_class_and_numbers() -> None:
    for cls in StreamHouseError.registry.values():
        error = StreamHouseError.from_detail(cls("what happened", retry_after_ms=3, limit=5).to_detail())
        assert type(error) is cls
        assert (error.message, error.retry_after_ms, error.details) == ("what happened", 3, {"limit": "5"})


def test_what_is_echoed_is_cut_so_that_it_travels() -> None:
    """gRPC peers refuse trailing metadata beyond about 8 KiB; the reason must arrive whatever the caller sent."""
    error = StreamHouseError("ü" * 100_000, **dict.fromkeys(("topic", "value"), "語" * 100000))
    size_bytes = len(error.to_detail().SerializeToString()) + 3 * len(error.message.encode())
    assert size_bytes < 8192
    assert error.message.endswith("… (100000 characters)")


def test_an_error_from_elsewhere_is_no_case_that_a_process_has_of_it() -> None:
    class OwnCase(InvalidArgument):
        """A refusal that one module tells from others."""

    assert OwnCase("x").to_detail().reason == InvalidArgument.reason
    detail = InvalidArgument("x", field="topic").to_detail()
    assert type(StreamHouseError.from_detail(detail)) is InvalidArgument
