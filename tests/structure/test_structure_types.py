"""What programs that are written against the SDK see of it: types, options, the version."""

import importlib.metadata
import inspect
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest
import streamhouse
from streamhouse import Admin, Consumer, Producer, sync

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = [path.parent for path in ROOT.glob("*/*/__init__.py") if path.parts[-3] in ("cli", "client", "embedded")] + [
    path.parent for path in ROOT.glob("[ls]*/*/*/__init__.py")
]

# What mypy is to say of a line stands behind it; of the others it is to say nothing.
PROGRAM = """
import streamhouse
from streamhouse import Admin, Consumer, Producer, errors, sync


async def main() -> None:
    async with Producer("a:1", acks="durable", linger_ms=1) as producer:
        reveal_type((await (await producer.send("t", b"x"))).offset)  # note: Revealed type is "int"
    async with Consumer("a:1", ["t"], group="g", start="latest") as consumer:
        async for record in consumer:
            reveal_type(record.key)  # note: Revealed type is "bytes | None"
        async for batch in consumer.batches():
            reveal_type(batch)  # note: Revealed type is "streamhouse.records.RecordBatch"
    async with Admin("a:1") as admin:
        reveal_type(await admin.list_topics())  # note: Revealed type is "list[streamhouse.cluster.Topic]"
        try:
            await admin.describe_topic("t")
        except errors.UnknownTopic as unknown:
            reveal_type(unknown)  # note: Revealed type is "shproto.errors.UnknownTopic"
            reveal_type(unknown.retry_after_ms)  # note: Revealed type is "int"
            reveal_type(unknown.details)  # note: Revealed type is "dict[str, str]"


def plain() -> None:
    with sync.Producer("a:1", acks="wal", linger_ms=3) as producer:
        reveal_type(producer.send("t", b"x").result().offset)  # note: Revealed type is "int"
    with sync.Consumer("a:1", ["t"], stop_at_end=True) as consumer:
        for record in consumer:
            reveal_type(record.value)  # note: Revealed type is "bytes | None"
    sync.Producer("a:1", acks="all")  # error: Argument "acks" to "Producer" has incompatible type
    sync.Consumer("a:1", ["t"], stop_at_the_end=True)  # error: Unexpected keyword argument "stop_at_the_end"
    reveal_type(streamhouse.__version__)  # note: Revealed type is "str"
"""


def test_every_package_says_that_it_is_typed() -> None:
    assert len(PACKAGES) == 14
    assert [path.name for path in PACKAGES if not (path / "py.typed").exists()] == []


@pytest.mark.long
def test_mypy_sees_the_types_in_a_program_of_somebody_else(tmp_path: Path) -> None:
    """Outside of the checkout and its configuration; one package without py.typed makes its errors `Any`."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run([*command, program.name], cwd=tmp_path, capture_output=True, text=True, timeout=280)
    said: dict[int, str] = {}
    for number, text in re.findall(r"^program\.py:(\d+): (.*)$", done.stdout, re.MULTILINE):
        said.setdefault(int(number), text.replace("builtins.", ""))
    lines = enumerate(PROGRAM.splitlines(), 1)
    expected = {number: line.partition("  # ")[2] for number, line in lines if "  # " in line}
    assert said.keys() == expected.keys(), done.stdout + done.stderr
    assert [text for number, text in said.items() if not text.startswith(expected[number])] == []


@pytest.mark.parametrize(
    ("plain", "wrapped", "own_options"),
    [(sync.Producer, Producer, {"exit_timeout_ms"}), (sync.Consumer, Consumer, set()), (sync.Admin, Admin, set())],
)
def test_help_of_the_classes_for_plain_code_shows_their_options(
    plain: type, wrapped: type, own_options: set[str]
) -> None:
    own, inner = inspect.signature(plain).parameters, inspect.signature(wrapped).parameters
    assert own.keys() == inner.keys() | own_options
    assert {name: own[name].default for name in inner} == {name: item.default for name, item in inner.items()}
    text = pydoc.render_doc(plain, renderer=pydoc.plaintext)
    assert all(name in text for name in own)
    assert "**options" not in text


def test_the_version_is_the_distributions() -> None:
    assert streamhouse.__version__ == importlib.metadata.version("streamhouse")
