"""Topics on Spark, in a Java process: the job of docs/scale-out.md, over a translated view and as a stream."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from shproto.errors import InvalidArgument
from streamhouse import Admin, Producer
from streamhouse_sql.core.translate import translate

from tests.integration.processes import EmbeddedProcess

MISSING = (
    "pyspark is not installed: pip install -c constraints.txt -e '.[spark]'"
    if importlib.util.find_spec("pyspark") is None
    else "Spark needs Java, and there is no java"
    if shutil.which("java") is None
    else ""
)
pytestmark = [
    pytest.mark.integration,
    pytest.mark.long,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(bool(MISSING), reason=MISSING or "-"),
]

ROOT = Path(__file__).resolve().parents[2]
TRANSLATED = ROOT / "services" / "sql" / "tests" / "translated"
BIDS = 400


@pytest.fixture
async def address(tmp_path: Path) -> AsyncIterator[str]:
    """Address of a platform with 400 bids in two partitions of the topic `bid`."""
    platform = EmbeddedProcess(tmp_path / "data", tmp_path)
    await platform.start_serving()
    try:
        async with Admin(platform.address) as admin:
            await admin.create_topic("bid", partitions=2)
        await produce(platform.address, range(BIDS))
        yield platform.address
    finally:
        await platform.stop()


async def produce(address: str, numbers: range) -> None:
    async with Producer(address) as producer:
        for number in numbers:
            bid = {
                "auction": number % 7,
                "bidder": number % 11,
                "price": number * 1.25,
                "channel": json.dumps({"x": str(number % 3)}) if number % 2 else str(number),
                "tags": ["a", f"t{number % 2}"],
                "ts": f"2026-01-01T10:{number // 60:02}:{number % 60:02}",
            }
            await producer.send("bid", json.dumps(bid).encode(), partition=number % 2)


def on_spark(arguments: list[str], tmp_path: Path) -> str:
    """Returns the output of a Python program."""
    environ = {**os.environ, "PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
        cwd=tmp_path,
        env=environ,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def job(tmp_path: Path) -> Path:
    """Returns the program of the page."""
    page = (ROOT / "docs" / "scale-out.md").read_text()
    found = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert found is not None
    path = tmp_path / "job.py"
    path.write_text(found[1])
    return path


def write_translated(text: str, path: Path, address: str) -> None:
    path.write_text("\n".join(str(found) for found in translate(text, "spark", servers=address)))


async def test_the_job_of_the_page(address: str, tmp_path: Path) -> None:
    """Its second run streams what was added since its first, and nothing twice."""
    text = (TRANSLATED / "tumble.sql").read_text() + "SELECT COUNT(*) AS n, SUM(bids) AS bids FROM per_auction;"
    write_translated(text, tmp_path / "q.sql", address)
    arguments = [str(job(tmp_path)), address, str(tmp_path / "q.sql"), str(tmp_path / "checkpoint")]
    assert on_spark(arguments, tmp_path).split() == ["280", str(BIDS), "done"]
    await produce(address, range(BIDS, BIDS + 50))
    assert on_spark(arguments, tmp_path).split()[1:] == [str(BIDS + 50), "done"]
    rows = streamed(tmp_path / "checkpoint-rows")
    assert sorted((row["partition"], row["offset"]) for row in rows) == [
        (partition, offset) for partition in (0, 1) for offset in range((BIDS + 50) // 2)
    ]
    assert {json.loads(row["value"])["price"] for row in rows} == {number * 1.25 for number in range(BIDS + 50)}


def streamed(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in directory.glob("*.json") for line in path.read_text().splitlines()]


def test_options_are_checked() -> None:
    from streamhouse.spark import BatchReader

    for options, said in (
        ({"bootstrap": "h:1"}, "source streamhouse needs the option topic"),
        ({"topic": "t"}, "source streamhouse needs the option bootstrap"),
        ({"bootstrap": "h:1", "topic": "t", "offsets": "5"}, "source streamhouse has no option 'offsets'"),
        ({"bootstrap": "h:1", "topic": "t", "start": "5"}, "option start is '5', must be earliest or latest"),
    ):
        with pytest.raises(InvalidArgument, match=said):
            BatchReader(options)
