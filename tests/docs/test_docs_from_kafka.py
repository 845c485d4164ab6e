"""`docs/from-kafka.md`: each option, default, method, command and setting that it names is there."""

import ast
import inspect
import re
import shlex
from pathlib import Path
from typing import Any, get_args

import click
import pytest
import streamhouse
import streamhouse.sync
from streamhouse.core.kafka_names import COMMON, KAFKA_NAMES
from streamhouse.core.options import Compression
from streamhouse_cli.app import cli

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "from-kafka.md").read_text()
SETTINGS = (ROOT / "docs" / "settings.md").read_text()
REQUIRED = inspect.Parameter.empty
NONE = "\N{EN DASH}"
UNITS = {"MiB": 1 << 20, "GiB": 1 << 30}


def table(title: str) -> list[list[str]]:
    """Returns the cells of the table below a heading, without its head."""
    section = re.search(rf"^##+ {title}\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert section is not None, title
    rows = [line for line in section[1].splitlines() if line.startswith("|")]
    assert len(rows) > 3, title
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]
    assert {len(row) for row in cells} == {len(cells[0])}, title
    return cells[2:]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def value(cell: str) -> object:
    """Returns the default that a cell names: a Python literal, 1,000 or 1 MiB."""
    text = cell.strip("`").replace(",", "")
    if text == "required":
        return REQUIRED
    number, _, unit = text.partition(" ")
    return int(number) * UNITS[unit] if unit else ast.literal_eval(text)


def options_of(client: str) -> dict[str, Any]:
    return {name: item.default for name, item in inspect.signature(getattr(streamhouse, client)).parameters.items()}


@pytest.mark.parametrize("client", ["Producer", "Consumer"])
def test_options_are_there_with_their_defaults(client: str) -> None:
    options = options_of(client)
    for _, _, here, default, _ in table(client):
        if here != NONE:
            (name,) = names(here)
            assert options[name] == value(default), name
        else:
            assert default == ""


@pytest.mark.parametrize("client", ["Producer", "Consumer"])
def test_options_are_those_that_the_errors_name(client: str) -> None:
    listed = {}
    for kafka, _, here, _, _ in table(client):
        for name in names(kafka):
            listed[name.replace(".", "_")] = "" if here == NONE else names(here)[0]
    known = {name: ours for name, (ours, _) in KAFKA_NAMES[client].items()}  # type: ignore[index]
    for name, ours in listed.items():
        assert ours == known.get(name, name), name
    # What all clients share is said once, in the producer's table.
    assert (known.keys() - listed.keys()) <= (set() if client == "Producer" else COMMON.keys())


def test_the_row_of_compression_has_every_codec_and_denies_none() -> None:
    (row,) = (row for row in table("Producer") if row[2] == "`compression`")
    offered, _, denied = row[4].partition("; no ")
    assert {row[3], *(f"`{name}`" for name in re.findall(r"`([^`]+)`", offered))} == {
        f'`"{name}"`' for name in get_args(Compression)
    }
    missing = re.search(r"^- \*\*Topics\*\*: (.*)$", PAGE, re.MULTILINE)
    assert missing is not None
    assert not any(name in denied or name in missing[1] for name in get_args(Compression))


def test_the_admins_options_are_there_with_their_defaults() -> None:
    found = re.search(r"`request_timeout_ms` \(([\d,]+)\) and `retry_timeout_ms` \(([\d,]+), Kafka's", PAGE)
    assert found is not None
    options = options_of("Admin")
    assert (options["request_timeout_ms"], options["retry_timeout_ms"]) == (value(found[1]), value(found[2]))


def test_other_defaults_in_the_text_are_those_of_the_code() -> None:
    polled = inspect.signature(streamhouse.Consumer.poll).parameters["max_records"].default
    assert f"`poll(max_records={polled})`" in PAGE
    session = setting("STREAMHOUSE_GROUP_SESSION_TIMEOUT_MS")
    assert f"`STREAMHOUSE_GROUP_SESSION_TIMEOUT_MS`, {int(session):,}" in PAGE


@pytest.mark.parametrize("module", [streamhouse, streamhouse.sync], ids=["async", "sync"])
def test_methods_are_there(module: Any) -> None:
    found = 0
    for *_, here in table("Methods"):
        for client, method in re.findall(r"`(Producer|Consumer|Admin)\.(\w+)`", here):
            assert hasattr(getattr(module, client), method), f"{client}.{method}"
            found += 1
    assert found > 40


def test_every_public_method_of_the_admin_has_its_place_or_is_an_operators() -> None:
    named = set(re.findall(r"`Admin\.(\w+)`", PAGE))
    # Without Kafka's names, which are there to raise AttributeError.
    public = {name for name in vars(streamhouse.Admin) if not name.startswith("_") and hasattr(streamhouse.Admin, name)}
    assert public - named == {"close", "orphaned_ranges", "declare_lost"}


def commands() -> list[str]:
    return [
        command for *_, here in table("Command line") for command in names(here) if command.startswith("streamhouse ")
    ]


@pytest.mark.parametrize("command", commands())
def test_commands_are_understood(command: str, tmp_path: Path) -> None:
    found: click.Command = cli
    arguments = [str(tmp_path) if word == "DIR" else word for word in shlex.split(command)[1:]]
    context = click.Context(cli, obj={})
    while isinstance(found, click.Group):
        found = found.commands[arguments.pop(0)]
    with found.make_context(found.name, arguments, parent=context):  # parses and checks; runs nothing
        pass


def setting(variable: str) -> str:
    """Returns the default of a setting as settings.md shows it, of several services the first."""
    found = re.findall(rf"^\| `{variable}` \| ([^|]+) \|", SETTINGS, re.MULTILINE)
    assert found, variable
    return str(found[0]).split(" (")[0].strip("`")


def test_settings_are_there_with_their_defaults() -> None:
    topic = {name: item.default for name, item in inspect.signature(streamhouse.Admin.create_topic).parameters.items()}
    for _, _, here, default, remark in table("Settings"):
        if here == NONE:
            assert default == ""
            continue
        (name,) = names(here)
        if not name.startswith("STREAMHOUSE_"):
            assert topic[name] == value(default), name
            assert "of a topic" in remark or "of each partition of a topic" in remark
            continue
        shown = setting(name)
        if shown.startswith("1/"):  # a part of the memory, at most so much
            largest = re.search(rf"`{name}` \| 1/[^|]+ to (\d+)", SETTINGS)
            assert largest is not None and int(largest[1]) == value(default), name
            assert "less on machines below" in remark
        else:
            default = default.strip("`")
            is_number = re.fullmatch(r"[\d,]+", default) is not None
            assert shown == (str(value(default)) if is_number else default), name
