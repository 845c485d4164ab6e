"""The command line after a plain `pip install .`: what talks to a running cluster works, and a command that
needs more names the extra in one line."""

import asyncio
import subprocess

import pytest
from streamhouse import Producer
from streamhouse.errors import StreamHouseError

from tests.bare import bare

pytestmark = pytest.mark.long

PATIENCE_S = 60
MAIN = "from streamhouse_cli import main; main(prog_name='streamhouse')"
READ = """
import sys
from streamhouse.sync import Consumer

with Consumer(sys.argv[1], ["t"], stop_at_end=True) as consumer:
    for batch in consumer.batches():
        print([record.value for record in batch])
        batch.to_arrow()
"""
SERVER = "pip install '.[server]' in a checkout of StreamHouse"
ZSTD = (
    "zstd compression needs zstandard, which is not installed: pip install zstandard, or '.[zstd]' in a checkout of "
    "StreamHouse"
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(bare(MAIN, *arguments), capture_output=True, text=True, timeout=PATIENCE_S, check=False)


async def run_beside(source: str, *arguments: str, stdin: bytes = b"") -> tuple[int | None, str, str]:
    """Runs a bare process beside this event loop, in which its platform lives; returns exit code, stdout and stderr."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = await asyncio.create_subprocess_exec(*bare(source, *arguments), **pipes)
    out, err = await asyncio.wait_for(process.communicate(stdin), PATIENCE_S)
    return process.returncode, out.decode(), err.decode()


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["serve", "--help"], ["consume", "--help"]])
def test_help_needs_no_extra(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 0 and "streamhouse" in done.stdout and not done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve"],
        ["ingest"],
        ["segmenter"],
        ["query"],
        ["coordinator"],
        ["health", "127.0.0.1:1"],
        ["backup", "--data-dir", "."],
        ["restore", "--yes", "--data-dir", "."],
        ["verify", "--data-dir", "."],
        ["sweep", "--data-dir", "."],
    ],
)
def test_a_command_whose_extra_is_missing_names_it_in_one_line(arguments: list[str], tmp_path) -> None:
    (tmp_path / "objects").mkdir()  # as a data directory has
    arguments = [str(tmp_path) if argument == "." else argument for argument in arguments]
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ") and done.stderr.endswith(f" is not installed: {SERVER}\n"), done.stderr
    assert done.stderr.count("\n") == 1


def test_a_file_that_is_not_there_is_said_before_the_extra_that_a_key_needs() -> None:
    done = run("segment", "inspect", "typo.seg")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: typo.seg is no file here; for a key of the object store this command needs ")
    assert done.stderr.endswith(f" is not installed: {SERVER}\n") and done.stderr.count("\n") == 1


def test_a_module_of_ours_that_is_missing_keeps_its_traceback() -> None:
    source = (
        f"import click, streamhouse_cli.app as app\n@app.cli.command\ndef broken(): import streamhouse.nothing\n{MAIN}"
    )
    done = subprocess.run(bare(source, "broken"), capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 1 and "Traceback" in done.stderr and "streamhouse.nothing" in done.stderr


@pytest.mark.smoke
async def test_records_are_produced_and_consumed_without_extras(platform, address) -> None:
    await platform.create_topic("t", 2)
    code, _, err = await run_beside(MAIN, "produce", "t", "--bootstrap", address, stdin=b"a\nb\nc\n")
    assert code == 0, err
    code, out, err = await run_beside(MAIN, "consume", "t", "--from", "earliest", "--max", "3", "--bootstrap", address)
    assert code == 0 and sorted(out.split()) == ["a", "b", "c"], err


async def test_zstd_without_its_package_is_refused_before_anything_is_sent(platform, address) -> None:
    await platform.create_topic("t", 1)
    arguments = ["produce", "t", "--compression", "zstd", "--bootstrap", address]
    code, _, err = await run_beside(MAIN, *arguments, stdin=b"a\n")
    assert code == 1
    assert err == f"error: {ZSTD}\n"


async def test_records_in_zstd_end_a_consumer_that_has_no_zstd_and_say_why(platform, address) -> None:
    await platform.create_topic("t", 1)
    async with Producer(address, compression="zstd") as producer:
        await producer.send_and_wait("t", b"x" * 1000)
    code, out, err = await run_beside(MAIN, "consume", "t", "--from", "earliest", "--bootstrap", address)
    assert (code, out) == (1, "")
    assert err == f"error: {ZSTD}\n"


async def test_to_arrow_without_pyarrow_names_the_extra(platform, address) -> None:
    await platform.create_topic("t", 1)
    async with Producer(address) as producer:
        await producer.send_and_wait("t", b"a")
    code, out, err = await run_beside(READ, address)
    assert (code, out) == (1, "[b'a']\n")
    how = "pip install pyarrow, or '.[arrow]' in a checkout of StreamHouse"
    assert err.endswith(f"to_arrow() needs pyarrow, which is not installed: {how}\n")


@pytest.mark.smoke
def test_a_missing_package_is_no_error_of_the_services() -> None:
    """It is a ModuleNotFoundError, and so nothing that a program tries again."""
    from shformat import MissingExtra

    assert issubclass(MissingExtra, ModuleNotFoundError) and not issubclass(MissingExtra, StreamHouseError)
