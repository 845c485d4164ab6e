"""The README's lines and the how-tos' commands, run as they stand against one platform."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from pyarrow import parquet
from streamhouse.sync import Admin, Consumer, Producer
from streamhouse_cli.serve_process import ServeProcess

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parents[2]
DEFAULT_ADDRESS = "127.0.0.1:7070"
TIMEOUT_S = 200


def blocks(page: str, language: str) -> list[str]:
    """Returns the fenced blocks of a page, without their indentation."""
    text = (ROOT / page).read_text()
    found = re.findall(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, of, block in found if of == language]


def run(command: list[str], server: str, folder: Path, given: str = "") -> tuple[str, str]:
    """Returns what the command printed, and what it said on stderr; it must end with 0."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("STREAMHOUSE_")}
    environ |= {"STREAMHOUSE_BOOTSTRAP": server, "PATH": f"{Path(sys.executable).parent}:{environ['PATH']}"}
    done = subprocess.run(
        command, input=given, cwd=folder, env=environ, text=True, capture_output=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, done.stderr


def shell(text: str, server: str, folder: Path) -> tuple[str, str]:
    return run(["bash", "-euo", "pipefail"], server, folder, text)


def test_the_readmes_ten_lines_of_python(server: str, tmp_path: Path) -> None:
    (program,) = blocks("README.md", "python")
    assert program.count(DEFAULT_ADDRESS) == 3
    (tmp_path / "example.py").write_text(program.replace(DEFAULT_ADDRESS, server))
    for _ in range(2):  # the group goes on where it was
        out, err = run([sys.executable, "-W", "error", "example.py"], server, tmp_path)
        assert re.fullmatch(r"""[0-3] \d+ b'user-1' b'\{"amount": 12\}'\n""", out) and not err, out + err


def test_the_readmes_lines_of_sql(server: str, tmp_path: Path) -> None:
    test_the_readmes_ten_lines_of_python(server, tmp_path)
    (block,) = (block for block in blocks("README.md", "") if block.startswith("streamhouse sql"))
    with Consumer(server, ["payments"], stop_at_end=True) as consumer:
        count = sum(len(batch) for batch in consumer.batches())
    out, _ = shell(block, server, tmp_path)
    assert "CREATE TABLE" in out and "CREATE MATERIALIZED VIEW" in out
    hours = [(int(n), int(amount)) for n, amount in re.findall(r"^20\d\d-.* (\d+) +(\d+)$", out, re.MULTILINE)]
    assert [sum(column) for column in zip(*hours, strict=True)] == [count, 12 * count], out
    assert f"({count} rows)" in out


def test_the_readmes_command_line(server: str, tmp_path: Path) -> None:
    (block,) = (block for block in blocks("README.md", "") if "streamhouse topic create" in block)
    lines = block.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["streamhouse", "topic"],
        ["seq", "1"],
        ["streamhouse", "consume"],
        ["streamhouse", "status"],
    ]
    shell(lines[0], server, tmp_path)
    assert "1,000,000" in shell(lines[1], server, tmp_path)[1]
    assert len(shell(lines[2], server, tmp_path)[0].split()) == 5
    assert re.search(r"\borders\b", shell(lines[3], server, tmp_path)[0])
    with Consumer(server, ["orders"], stop_at_end=True) as consumer:
        values = [value for batch in consumer.batches() for value in batch.values.to_list()]
    assert sorted(map(int, filter(None, values))) == list(range(1, 1_000_001))


def test_a_stopped_platforms_directory_is_a_platform_and_the_way_back(tmp_path: Path) -> None:
    """docs/upgrading.md, with one version: the directory is copied between a stop and the next start."""

    def values(folder: str) -> list[bytes | None]:
        with ServeProcess(tmp_path / folder, tmp_path / "serve.log") as serve:
            with Consumer(serve.address, ["orders"], stop_at_end=True) as consumer:
                read = [record.value for record in consumer]
            with Producer(serve.address) as producer:
                producer.send("orders", f"written to {folder}".encode())
        return read

    with ServeProcess(tmp_path / "data", tmp_path / "serve.log") as serve:
        with Admin(serve.address) as admin:
            admin.create_topic("orders", partitions=1)
        with Producer(serve.address) as producer:
            producer.send("orders", b"before")
    shutil.copytree(tmp_path / "data", tmp_path / "copy", symlinks=True)
    assert values("data") == [b"before"]
    assert values("copy") == [b"before"]


def test_the_page_about_partitions(server: str, tmp_path: Path) -> None:
    create, alter, copy = blocks("docs/partitions.md", "sh")
    keys = [b"key-%d" % (number % 100) for number in range(1_000)]

    shell(create, server, tmp_path)
    with Producer(server) as producer:
        producer.send_many("clicks", [b"%d" % number for number in range(1_000)], keys=keys)
    assert "24" in shell(alter, server, tmp_path)[0]
    shell(copy, server, tmp_path)

    with Admin(server) as admin:
        partitions = {topic.topic: topic.partitions for topic in admin.list_topics()}
    assert (partitions["clicks"], partitions["clicks-24"]) == (24, 24)
    found = {}
    for topic in ("clicks", "clicks-24"):
        with Consumer(server, [topic], stop_at_end=True) as consumer:
            found[topic] = [(r.partition, r.key, r.value, r.timestamp_ms) for r in consumer]
    assert Counter(record[1:] for record in found["clicks"]) == Counter(record[1:] for record in found["clicks-24"])
    assert max(record[0] for record in found["clicks"]) < 12  # what is written stays where it is

    # Where a new record of each key goes now, its copied ones are.
    with Producer(server) as producer:
        placed = producer.send_many("clicks-24", [b""] * 100, keys=keys[:100]).result().partitions.tolist()
    now = dict(zip(keys[:100], placed, strict=True))
    assert {(partition, key) for partition, key, _, _ in found["clicks-24"]} == {(now[key], key) for key in now}
    moved = len({key for partition, key, _, _ in found["clicks"] if now[key or b""] != partition})
    assert 25 <= moved <= 75  # about half of the keys, as the page says


def test_the_page_about_sql(server: str, tmp_path: Path) -> None:
    first, formats = blocks("docs/sql-shell.md", "sh")
    table, _, error, session, live, changes = blocks("docs/sql-shell.md", "")
    assert "EMIT CHANGES" in live and "EMIT CHANGES" in changes
    assert shell(first, server, tmp_path)[0].endswith(table)
    out, _ = shell(formats, server, tmp_path)
    assert re.fullmatch(r'_offset,_value\n0,"\{""carrier"":""\w\w"",""distance"":\d+\}"\n', out)
    assert parquet.read_table(tmp_path / "flights.parquet").num_rows == 3
    typed = re.findall(r"^(?:streamhouse> | +\.\.> )(.*)$", session, re.MULTILINE)
    assert shell(f"streamhouse sql <<'END'\n{chr(10).join(typed)}\nEND\n", server, tmp_path)[0] == table
    (tmp_path / "report.sql").write_text("SELECT 1;\n  SELECT *\nFROM flight;")
    assert shell("! streamhouse sql -f report.sql", server, tmp_path)[1] == error
