"""Every program of `examples/`, as a process, twice: what it prints, and what it left in topics, files and groups."""

import ast
import csv
import importlib.util
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections import Counter, defaultdict
from contextlib import closing
from pathlib import Path
from types import ModuleType

import pyarrow.parquet
import pytest
from streamhouse import Record
from streamhouse.sync import Admin, Consumer, Producer
from streamhouse_cli.serve import DEFAULT_ADDRESS

from tests.bare import bare

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
TIMEOUT_S = 200


class Examples:
    """Runs the programs in a directory of the test."""

    def __init__(self, server: str, folder: Path) -> None:
        self.server = server
        self.folder = folder

    def start(self, name: str, *arguments: str) -> subprocess.Popen[str]:
        environ = {key: value for key, value in os.environ.items() if not key.startswith("STREAMHOUSE_")}
        # Warnings are errors, as in the tests themselves: an unclosed file or a future that nobody awaited.
        command = [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py"), "--server", self.server, *arguments]
        return subprocess.Popen(
            command, cwd=self.folder, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def run(self, name: str, *arguments: str, code: int = 0) -> str:
        """Returns what the program printed; its standard error where it is to fail."""
        with self.start(name, *arguments) as process:
            try:
                out, err = process.communicate(timeout=TIMEOUT_S)
            except BaseException:
                process.kill()
                raise
        assert process.returncode == code, out + err
        assert code or not err, err
        return err if code else out

    def records(self, topic: str) -> list[Record]:
        """Returns all records of a topic, by partition and offset."""
        with Consumer(self.server, [topic], stop_at_end=True) as consumer:
            return sorted(consumer, key=lambda record: (record.partition, record.offset))

    def committed(self, group: str) -> dict[tuple[str, int], int]:
        """Returns where the group goes on in each partition of which it has read something."""
        with Admin(self.server) as admin:
            found = admin.group_offsets(group)
        return {(commit.topic, commit.partition): commit.offset for commit in found if commit.offset}

    def ends(self, topic: str) -> dict[tuple[str, int], int]:
        """Returns the end of each partition that has records."""
        with Admin(self.server) as admin:
            return {tuple(where): end.offset for where, end in admin.offsets(topic, "latest").items() if end.offset}


@pytest.fixture
def examples(server: str, tmp_path: Path) -> Examples:
    return Examples(server, tmp_path)


def load(name: str) -> ModuleType:
    """Returns a program as a module, for its functions."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- all of them


@pytest.mark.parametrize("name", NAMES)
def test_a_program_says_how_it_is_run_and_is_short(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text()
    docstring = ast.get_docstring(ast.parse(text)) or ""
    assert f"python examples/{name}.py" in docstring
    assert f'parser.add_argument("--server", default="{DEFAULT_ADDRESS}"' in text
    assert len(text.splitlines()) <= 90


def test_every_program_is_run_here_and_listed() -> None:
    listed = re.findall(r"^\| \[(\w+)\.py\]\(\1\.py\) \|", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == NAMES
    run = set(re.findall(r'examples\.run\("(\w+)"', Path(__file__).read_text()))
    assert run == set(NAMES)


# ---- each


def test_sync_client(examples: Examples) -> None:
    for count in (101, 202):
        out = examples.run("sync_client")
        assert "refused: topic 'no-such-topic' does not exist (UNKNOWN_TOPIC)" in out
        assert out.endswith("101 records read\n")  # the group goes on where it was
        records = examples.records("example-greetings")
        assert len(records) == count
        assert examples.committed("example-sync") == examples.ends("example-greetings")
    assert Counter(record.key for record in records) == {b"anna": 2, b"bert": 200}
    assert [record.headers for record in records if record.key == b"anna"] == [(("language", b"en"),)] * 2


def test_async_client(examples: Examples) -> None:
    for count in (50, 100):
        out = examples.run("async_client")
        assert "50 ticks acknowledged\n" in out
        assert re.search(r"^50 ticks read, \d+\.\d ms after they were sent \(median\)$", out, re.MULTILINE), out
        assert len(examples.records("example-ticks")) == count


def test_threads(examples: Examples) -> None:
    for count in (1_000, 2_000):
        out = examples.run("threads")
        assert "1000 jobs written by 4 threads through one producer\n" in out
        assert "1000 jobs done by 4 threads through one consumer, 1000 of them different\n" in out
        assert len(examples.records("example-jobs")) == count
        assert examples.committed("example-jobs") == examples.ends("example-jobs")


def test_etl_csv_loads_its_own_rows(examples: Examples) -> None:
    for runs in (1, 2):
        assert examples.run("etl_csv").startswith("5 rows acknowledged in example-orders\n")
        records = examples.records("example-orders")
        rows = [json.loads(record.value or b"") for record in records]
        assert sorted(row["order_id"] for row in rows) == sorted(["1001", "1002", "1003", "1004", "1005"] * runs)
    assert {row["city"] for row in rows} == {"Bergen", "Oslo", "Bodø"}
    assert [row["amount"] for row in rows if row["order_id"] == "1003"] == [None, None]
    partitions = defaultdict(set)
    for record, row in zip(records, rows, strict=True):
        assert record.key == row["customer"].encode()
        partitions[record.key].add(record.partition)
    assert all(len(found) == 1 for found in partitions.values())


def test_etl_csv_loads_a_file_and_counts_by_partition(examples: Examples) -> None:
    with open(examples.folder / "sales.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "shop", "note"])
        writer.writerows([n, f"shop-{n % 50}", 'two\nlines, "quoted"'] for n in range(25_000))
    out = examples.run("etl_csv", "--csv", "sales.csv", "--key", "shop", "--topic", "example-sales")
    records = examples.records("example-sales")
    by_partition = Counter(record.partition for record in records)
    assert out.splitlines() == [
        "25000 rows acknowledged in example-sales",
        *(f"  partition {partition}: {count}" for partition, count in sorted(by_partition.items())),
    ]
    by_shop = defaultdict(list)
    for record in records:
        row = json.loads(record.value or b"")
        assert row["note"] == 'two\nlines, "quoted"'
        by_shop[row["shop"]].append(int(row["id"]))
    assert by_shop == {f"shop-{n}": list(range(n, 25_000, 50)) for n in range(50)}  # in the order of the file


def test_etl_csv_refuses_rows_and_keys_that_do_not_fit(examples: Examples) -> None:
    (examples.folder / "bad.csv").write_text("a,b\n1,2\n3\n")
    arguments = ("--csv", "bad.csv", "--topic", "example-bad")
    assert (
        examples.run("etl_csv", *arguments, "--key", "a", code=1) == "line 3 does not have the 2 fields of the header\n"
    )
    (examples.folder / "bad.csv").write_text("a,b\n1,2\n")
    assert examples.run("etl_csv", *arguments, "--key", "c", code=1) == "there is no column 'c', only a, b\n"
    assert examples.records("example-bad") == []


def test_batch_sink(examples: Examples) -> None:
    def written() -> list[tuple[int, int, str, int]]:
        with closing(sqlite3.connect(examples.folder / "readings.sqlite")) as database:
            query = "SELECT partition, offset, sensor, value FROM readings ORDER BY partition, offset"
            return database.execute(query).fetchall()

    def sent() -> list[tuple[int, int, str, int]]:
        records = examples.records("example-readings")
        return [(r.partition, r.offset, (r.key or b"").decode(), int(r.value or b"")) for r in records]

    sizes = [int(n) for n in re.findall(r"^(\d+) records written", examples.run("batch_sink"), re.MULTILINE)]
    assert sum(sizes) == 2_500 and max(sizes) <= 1_000
    assert written() == sent() and len(sent()) == 2_500
    assert examples.committed("example-sink") == examples.ends("example-readings")
    assert examples.run("batch_sink") == "done\n"

    # A crash between transaction and commit: the group reads again what is written.
    with Admin(examples.server) as admin:
        admin.reset_offsets("example-sink", "earliest", execute=True)
    assert "2500 records" in examples.run("batch_sink", "--records", "100000", "--seconds", "60")
    assert written() == sent()

    # Ten records are no full batch: they are written for the time limit, and the program goes on.
    with examples.start("batch_sink", "--follow", "--records", "100000", "--seconds", "0.5") as following:
        try:
            with Producer(examples.server) as producer:
                producer.send_many("example-readings", [b"7"] * 10, keys=[b"sensor-late"] * 10, partition=0)
            assert following.stdout is not None
            count = 0
            while count < 10:
                line = following.stdout.readline()
                assert line.endswith("records written and committed\n"), line
                count += int(line.split()[0])
            assert following.poll() is None
            following.send_signal(signal.SIGINT)
            out, err = following.communicate(timeout=TIMEOUT_S)
        finally:
            following.kill()
    assert (following.returncode, out, err) == (0, "done\n", "")
    assert written() == sent() and len(sent()) == 2_510
    assert examples.committed("example-sink") == examples.ends("example-readings")


def test_exactly_once_copy_survives_a_failure_in_the_middle(examples: Examples) -> None:
    def rows() -> list[tuple[str, int]]:
        with closing(sqlite3.connect(examples.folder / "payments.sqlite")) as database:
            return database.execute("SELECT account, cents FROM payments ORDER BY 1, 2").fetchall()

    def sent() -> list[tuple[str, int]]:
        records = examples.records("example-payments")
        return sorted(((r.key or b"").decode(), int(r.value or b"")) for r in records)

    assert examples.run("exactly_once_copy") == "1000 records copied now, 1000 rows in payments.sqlite\n"
    assert rows() == sent()

    # The next run fails at its 400th row, in the middle of a transaction.
    with closing(sqlite3.connect(examples.folder / "payments.sqlite")) as database, database:
        database.execute(
            "CREATE TRIGGER fail AFTER INSERT ON payments WHEN (SELECT count(*) FROM payments) = 1400"
            " BEGIN SELECT RAISE(ABORT, 'no more'); END"
        )
    assert "no more" in examples.run("exactly_once_copy", code=1)
    assert 1_000 <= len(rows()) < 1_400
    with closing(sqlite3.connect(examples.folder / "payments.sqlite")) as database, database:
        database.execute("DROP TRIGGER fail")
    assert examples.run("exactly_once_copy").endswith(" copied now, 3000 rows in payments.sqlite\n")
    assert rows() == sent() and len(sent()) == 3_000

    # Another copy that read the same batch comes second.
    program = load("exactly_once_copy")
    with Admin(examples.server) as admin:
        topic_id = admin.describe_topic("example-payments").topic.topic_id
    with Consumer(examples.server, ["example-payments"], stop_at_end=True) as consumer:
        batch = next(consumer.batches())
    with (
        closing(sqlite3.connect(examples.folder / "payments.sqlite")) as database,
        pytest.raises(SystemExit, match=f"another copy has partition {batch.partition} beyond offset 0 already"),
    ):
        program.copy(database, topic_id, batch)
    assert rows() == sent()


def test_exactly_once_copy_of_a_topic_that_was_made_again_begins_anew(examples: Examples) -> None:
    examples.run("exactly_once_copy")
    with Admin(examples.server) as admin:
        admin.delete_topic("example-payments")
    out = examples.run("exactly_once_copy")
    assert out.startswith("1000 records copied now, ")


def test_dead_letters(examples: Examples) -> None:
    for runs in (1, 2):
        out = examples.run("dead_letters")
        assert out.endswith("2 records processed, 1950 cents; 3 dead letters\n")
        records = {(r.partition, r.offset): r for r in examples.records("example-invoices")}
        letters = examples.records("example-invoices.dead-letter")
        assert len(records) == 5 * runs and len(letters) == 3 * runs
        assert examples.committed("example-invoices") == examples.ends("example-invoices")
    for letter in letters:
        headers = dict(letter.headers)
        assert headers["source.topic"] == b"example-invoices"
        source = records[int(headers["source.partition"] or b""), int(headers["source.offset"] or b"")]
        assert (letter.key, letter.value, letter.timestamp_ms) == (source.key, source.value, source.timestamp_ms)
    kinds = Counter((letter.value, dict(letter.headers)["error.class"]) for letter in letters)
    assert kinds == {
        (b"not JSON", b"JSONDecodeError"): 2,
        (b'{"id": 2}', b"KeyError"): 2,
        (b'{"id": 4, "cents": "?"}', b"ValueError"): 2,
    }


def test_group_of_three(examples: Examples) -> None:
    for count in (600, 1_200):
        out = examples.run("group_of_three")
        members = re.findall(r"^member-[123]: 200 records of partitions \[(\d), (\d)\]$", out, re.MULTILINE)
        assert sorted(int(number) for pair in members for number in pair) == [0, 1, 2, 3, 4, 5], out
        assert out.endswith("600 records sent, each read by one of 3 members\n")
        assert len(examples.records("example-clicks")) == count
        assert examples.committed("example-group-of-three") == examples.ends("example-clicks")


def test_read_by_time(examples: Examples) -> None:
    for _ in range(2):
        assert examples.run("read_by_time").splitlines() == [
            "10:33 offset 35: 15.6 °C",  # came late
            "10:34 offset 33: 15.6 °C",
            "10:35 offset 34: 15.6 °C",
            "3 records from 10:33 to before 10:36",
        ]
    out = examples.run("read_by_time", "--begin", "2024-05-01T10:30", "--end", "2024-05-01T13:00+02:00")
    assert len(out.splitlines()) == 31
    assert out.startswith("10:30 offset 30: 15.5 °C\n")
    assert out.endswith("10:59 offset 59: 16.0 °C\n30 records from 10:30 to before 13:00\n")


def test_to_arrow_says_what_to_install() -> None:
    source = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
    command = bare(source, str(EXAMPLES / "to_arrow.py"))
    done = subprocess.run(command, text=True, capture_output=True, timeout=TIMEOUT_S, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "pyarrow is not here: pip install pyarrow\n")


def test_to_arrow(examples: Examples) -> None:
    for _ in range(2):
        out = examples.run("to_arrow")
        table = pyarrow.parquet.read_table(examples.folder / "trips.parquet")
        assert re.match(r"10000 records, \d+ bytes as columns, in trips\.parquet\n", out), out
        places = set(zip(table["partition"].to_pylist(), table["offset"].to_pylist(), strict=True))
        records = {(r.partition, r.offset): json.loads(r.value or b"") for r in examples.records("example-trips")}
        assert places == records.keys() and len(places) == 10_000
        for row in table.to_pylist():
            assert records[row["partition"], row["offset"]] == {"city": row["city"], "km": row["km"]}
        # The example does without them: the program says what to install.
        for package, title, shown in (("polars", "Polars", "shape: (3, 2)"), ("duckdb", "DuckDB", "longest")):
            is_installed = importlib.util.find_spec(package) is not None
            assert (shown in out) is is_installed
            assert (f"{title} is not here: pip install {package}\n" in out) is not is_installed


def test_sql_live(examples: Examples) -> None:
    for runs in (1, 2):
        last = examples.run("sql_live").splitlines()[-1]
        shown = dict(part.split(": ") for part in re.split(r", (?=B|O)", last))
        assert shown.keys() == {"Oslo", "Bergen", "Bodø"}
        assert all(said == f"{100 * runs} trips, {225.0 * runs} km" for said in shown.values()), last
        assert len(examples.records("example-live-trips")) == 300 * runs


def test_sql_queries(examples: Examples) -> None:
    for _ in range(2):
        out = examples.run("sql_queries")
        rides = [json.loads(record.value or b"") for record in examples.records("example-rides")]
        assert len(rides) == 10_000
        expected = []
        for city in sorted({ride["city"] for ride in rides}):
            kms = [ride["km"] for ride in rides if ride["city"] == city]
            expected.append(f"{city}: {len(kms)} rides, {sum(kms)} km")
        long_rides = sum(ride["km"] >= 20 for ride in rides)
        expected += ["10000 records scanned for 3 rows", f"{long_rides} long rides", "line 1, column 18 is wrong"]
        assert out.splitlines() == expected
