"""The command line in process: parsing, error lines, inspection. What talks to a platform is in test_cli_serve.py."""

import json
import os
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from shformat import (
    Records,
    SegmentBuilder,
    encode_batch,
    encode_frame_header,
    encode_wal_file_header,
    stamp_batch,
)
from shruntime.settings import SettingsError
from streamhouse_cli.app import cli
from streamhouse_cli.failures import explain

TOPIC_ID = uuid.uuid4().bytes
RECORDS_PER_BATCH = 30_000


def run(*arguments: str, **options: object) -> Result:
    return CliRunner().invoke(cli, arguments, **options)  # type: ignore[arg-type]


def segment_bytes(partition: int, batches: int = 3) -> bytes:
    builder = SegmentBuilder(TOPIC_ID, partition, 7)
    for at in range(batches):
        records = Records.from_lists(
            [b"value %d" % i for i in range(RECORDS_PER_BATCH)], timestamps_ms=1_700_000_000_000
        )
        builder.add(stamp_batch(encode_batch(records), at * RECORDS_PER_BATCH, 7))
    return b"".join(builder.finish().parts)


def wal_bytes(frames: int) -> bytes:
    parts = [encode_wal_file_header(uuid.uuid4().bytes, 1)]
    for at in range(frames):
        batch = stamp_batch(encode_batch(Records.from_lists([b"a", b"b"], timestamps_ms=at)), at * 2, 7)
        parts += [encode_frame_header(TOPIC_ID, 1, 7, at * 2, 2, batch), bytes(batch)]
    return b"".join(parts)


@pytest.fixture(scope="module")
def two_segments() -> bytes:
    return segment_bytes(0) + segment_bytes(1)


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# ---- help


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from streamhouse_cli.app import cli\n"
        "cli(['--help'], standalone_mode=False)\n"
        "heavy = {'grpc', 'numpy', 'rich', 'pydantic', 'asyncio', 'shformat', 'shproto'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "streamhouse serve" in done.stdout


def test_a_local_store_and_a_refusal_load_no_s3_client() -> None:
    """Which takes longer than the command itself."""
    code = (
        "import sys\n"
        "from shproto.errors import UnknownTopic\n"
        "from streamhouse_cli.failures import explain\n"
        "print(explain(UnknownTopic('no such topic'), {}), 'shstore' in sys.modules)\n"
        "from shstore import open_store\n"
        "open_store('file:///tmp')\n"
        "sys.exit('loaded' if {'aioboto3', 'botocore'} & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "no such topic (UNKNOWN_TOPIC) False\n"


@pytest.mark.parametrize(
    "command",
    ["serve", "topic create", "topic list", "topic describe", "topic configs", "topic alter",
     "topic delete", "topic delete-records", "produce", "consume", "sql", "segment inspect",
     "wal inspect", "status", "group list", "group describe", "group reset-offsets", "group delete", "partition settle",
     "verify", "sweep", "health", "ingest", "segmenter", "query", "coordinator"],
)  # fmt: skip
def test_every_command_has_help(command: str) -> None:
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    assert len(result.output.splitlines()) > 4


# ---- errors


@pytest.mark.parametrize(
    "arguments",
    [
        "topic list",
        "topic describe t",
        "topic create t --partitions 1",
        "topic delete t --yes",
        "produce t --file /dev/null",
        "status",
        "group list",
        "group describe g",
        "group reset-offsets g --to latest",
        "group delete g --yes",
        "partition settle t 0 --lost --yes",
        "verify --store-dir STORE",
        "sweep --store-dir STORE",
    ],
)
def test_nobody_there_says_what_to_start(arguments: str, closed_port: int, tmp_path: Path) -> None:
    address = f"127.0.0.1:{closed_port}"
    (tmp_path / "objects").mkdir()  # a store
    command = arguments.replace("STORE", str(tmp_path)).split()
    result = run(*command, "--bootstrap", address, "--retry-timeout-ms", "1000")
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: nothing answers at {address}: start it with `streamhouse serve`, or name another with --bootstrap "
        f"(no answer from {address} within retry_timeout_ms = 1000; "
        f"last error: cannot connect to {address}: Connection refused)\n"
    )
    assert result.stdout == ""


NO_DATA_DIR = "is no data directory of `streamhouse serve`: it has no directory objects"
NO_STORE = "is no object store of StreamHouse: it has no directory objects"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("verify --data-dir DIR", NO_DATA_DIR),
        ("verify --store-dir DIR", NO_STORE),
        ("sweep --data-dir DIR", NO_DATA_DIR),
        ("sweep --store-dir DIR --dry-run", NO_STORE),
        ("backup --data-dir DIR", NO_DATA_DIR),
        ("restore --data-dir DIR --yes", NO_DATA_DIR),
        ("segment inspect key --store-dir DIR", NO_STORE),
        ("wal inspect DIR", "holds no *.wal file"),
    ],
)
def test_a_directory_of_something_else_is_named_and_left_as_it_is(arguments: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    result = run(*arguments.replace("DIR", str(tmp_path)).split())
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {tmp_path} {message}")
    assert (result.stdout, len(result.stderr.splitlines())) == ("", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(("command", "message"), [("segment", "no segment"), ("wal", "no write-ahead log")])
def test_a_file_of_something_else_is_named_by_what_it_begins_with(command: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "notes.wal"
    file.write_text("these are notes, and long enough for a header: " * 20)
    for json_output in ([], ["--json"]):
        result = run(command, "inspect", str(file), *json_output)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith(f"error: {file} is {message}, or nothing of it can be read: ")
        assert "b'thes'" in result.stderr


def test_consume_of_nobody_says_what_to_start(closed_port: int) -> None:
    """Its output needs a descriptor of its own, so it runs as a process."""
    command = [sys.executable, "-m", "streamhouse_cli", "consume", "t", "--retry-timeout-ms", "1000"]
    done = subprocess.run(
        [*command, "--bootstrap", f"127.0.0.1:{closed_port}"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: nothing answers at 127.0.0.1:{closed_port}: start it with ")


@pytest.mark.parametrize(("command", "closed"), [("produce", "stdin"), ("consume", "stdout")])
def test_a_closed_descriptor_is_one_line(command: str, closed: str, closed_port: int) -> None:
    shut = {"stdin": "<&-", "stdout": ">&-"}[closed]
    line = f"exec {sys.executable} -m streamhouse_cli {command} t --bootstrap 127.0.0.1:{closed_port} {shut}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, f"error: {closed} is closed\n")


def test_bootstrap_comes_from_the_environment(closed_port: int) -> None:
    address = f"127.0.0.1:{closed_port}"
    result = run("status", "--retry-timeout-ms", "1", env={"STREAMHOUSE_BOOTSTRAP": address})
    assert address in result.stderr


@pytest.mark.parametrize(
    "address", ["", "localhost", "localhost:", ":7070", "localhost:0", "localhost:65536", "a:1,,b:2", "http://a:1"]
)
def test_a_malformed_address_is_a_usage_error(address: str) -> None:
    result = run("status", "--bootstrap", address)
    assert result.exit_code == 2
    assert "HOST:PORT" in result.stderr


@pytest.mark.parametrize("address", ["localhost:1", "a:1,b:65535", "[::1]:7070"])
def test_addresses_that_are_fine(address: str) -> None:
    assert "--bootstrap" not in run("topic", "create", "t", "--bootstrap", address).stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["topic", "create", "t"],
        ["topic", "create", "t", "--partitions", "0"],
        ["topic", "create", "t", "--partitions", "1", "--min-acks", "all"],
        ["topic", "create", "t", "--partitions", "1", "--retention-ms", "0"],
        ["produce"],
        ["produce", "t", "--key-field", "a", "--key-separator", ":"],
        ["produce", "t", "--key-separator", ""],
        ["produce", "t", "--key-separator", "\\q"],
        ["produce", "t", "--format", "json", "--key-field", "a"],
        ["produce", "t", "--repartition"],
        ["produce", "t", "--csv-header"],
        ["produce", "t", "--format", "csv", "--key-field", "a"],
        ["produce", "t", "--format", "csv", "--csv-delimiter", "ab"],
        ["produce", "t", "--format", "csv", "--key-separator", ":"],
        ["produce", "t", "--acks", "all"],
        ["produce", "t", "--file", "/nonexistent/file"],
        ["consume", "t", "--from", "yesterday"],
        ["consume", "t", "--max", "0"],
        ["consume", "t", "--format", "xml"],
        ["status", "--topic", "t", "--all"],
        ["consume", "t", "--delimiter", "x"],
        ["consume", "t", "--group", "g", "--partition", "1"],
        ["wal", "inspect", "/nonexistent/directory"],
        ["health", "nowhere"],
        ["nonsense"],
    ],
)
def test_usage_errors_exit_2(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("produce t\udcff", "TOPIC 't\\xff'"),
        ("produce t --key-field \udce9", "--key-field '\\xe9'"),
        ("consume \udcff", "TOPIC '\\xff'"),
        ("consume t --group g\udcff", "--group 'g\\xff'"),
        ("consume t --from \udcff", "--from '\\xff'"),
        ("topic create \udcff --partitions 1", "NAME '\\xff'"),
        ("group reset-offsets \udcff --to latest", "NAME '\\xff'"),
        ("partition settle t 0 --lost --reason \udcff", "--reason '\\xff'"),
        ("status --bootstrap \udcff:1", "--bootstrap '\\xff:1'"),
        ("health \udcff:1", "HOST:PORT '\\xff:1'"),
    ],
)
def test_an_argument_that_is_not_utf8_is_one_line(arguments: str, named: str) -> None:
    result = run(*arguments.split())
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"error: {named} is not UTF-8\n"


def test_a_file_whose_name_is_not_utf8_is_read(tmp_path: Path, closed_port: int) -> None:
    file = tmp_path / "\udcff"
    file.touch()
    result = run(
        "produce", "t", "--file", str(file), "--bootstrap", f"127.0.0.1:{closed_port}", "--retry-timeout-ms", "1000"
    )
    assert result.stderr.startswith("error: nothing answers at")


def test_health_of_nobody(closed_port: int) -> None:
    result = run("health", f"127.0.0.1:{closed_port}")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: 127.0.0.1:{closed_port}: UNAVAILABLE")


@pytest.mark.parametrize("command", ["serve", "ingest", "query", "coordinator"])
def test_an_unknown_setting_is_named(command: str) -> None:
    result = run(command, env={"STREAMHOUSE_WAL_DRI": "x"})
    assert result.exit_code == 1
    assert result.stderr.startswith("error: unknown setting STREAMHOUSE_WAL_DRI; did you mean wal_dir?")


def test_the_segmenter_refuses_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "streamhouse_cli", "segmenter"],
        env=os.environ | {"STREAMHOUSE_ORPHAN_DRY_RUN": "maybe"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: settings of segmenter: orphan_dry_run (STREAMHOUSE_ORPHAN_DRY_RUN) = 'maybe'")
    assert len(done.stderr.splitlines()) == 1


def test_a_setting_out_of_range_is_named() -> None:
    result = run("ingest", env={"STREAMHOUSE_RPC_TIMEOUT_MS": "7"})
    assert result.exit_code == 1
    assert "STREAMHOUSE_RPC_TIMEOUT_MS" in result.stderr and "'7'" in result.stderr


def test_a_table_for_another_service_is_known(tmp_path: Path) -> None:
    config = tmp_path / "streamhouse.toml"
    config.write_text("rpc_timeout_ms = 7\n[query]\n[segmenter]\n[coordinator]\n[serve]\n")
    result = run("ingest", "--config", str(config))
    assert "unknown table" not in result.stderr
    assert "RPC_TIMEOUT_MS" in result.stderr


@pytest.mark.parametrize("command", [("serve",), ("ingest",), ("verify",), ("sweep",), ("segment", "inspect", "key")])
def test_a_file_of_settings_is_named_as_it_was_typed(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STREAMHOUSE_CONFIG", "")  # `serve` sets it for the services in its process: undone after
    missing = run(*command, "--config", "nope.toml")
    assert missing.exit_code == 2
    assert "'--config'" in missing.stderr and "'nope.toml'" in missing.stderr
    broken = tmp_path / "broken.toml"
    broken.write_text("[ingest\n")
    result = run(*command, "--config", str(broken))
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {broken}: ") and "STREAMHOUSE_CONFIG" not in result.stderr


@pytest.mark.parametrize("group", ["", "topic", "segment", "wal", "group", "partition"])
def test_no_command_is_described_by_half_a_sentence(group: str) -> None:
    shown = run(*group.split(), "--help").stdout
    assert [line for line in shown.splitlines()[1:] if line.endswith("...")] == []


def test_explanations_are_one_line() -> None:
    from shproto.errors import InvalidArgument, Overloaded, Unavailable

    assert explain(SettingsError("two\nlines"), {}) == "two lines"
    assert explain(SettingsError("red \x1b[31m"), {}) == "red \\x1b[31m"
    assert explain(InvalidArgument("partitions is 0, must be 1 to 10"), {}) == (
        "partitions is 0, must be 1 to 10 (INVALID_ARGUMENT)"
    )
    assert explain(Overloaded("the log is full", retry_after_ms=50), {}) == (
        "the log is full (OVERLOADED); try again in 50 ms"
    )
    assert explain(Unavailable("PostgreSQL does not answer"), {}) == (
        "PostgreSQL does not answer (UNAVAILABLE); trying again may help"
    )
    assert explain(KeyError("a defect"), {}) is None


# ---- inspection


def test_segment_file_is_drawn(tmp_path: Path) -> None:
    file = tmp_path / "one.seg"
    file.write_bytes(segment_bytes(3))
    result = run("segment", "inspect", str(file))
    assert result.exit_code == 0
    assert f"topic id {uuid.UUID(bytes=TOPIC_ID)}, partition 3, epoch 7" in result.stdout
    assert f"offsets 0 to {3 * RECORDS_PER_BATCH:,} (exclusive)" in result.stdout
    assert "index intact" in result.stdout


def test_an_object_of_several_segments_is_taken_apart(tmp_path: Path, two_segments: bytes) -> None:
    file = tmp_path / "two.seg"
    file.write_bytes(two_segments)
    described = json.loads(run("segment", "inspect", str(file), "--json").stdout)
    first, second = described["segments"]
    assert (first["object_at"], first["header"]["partition"]) == (0, 0)
    assert (second["object_at"], second["header"]["partition"]) == (first["size_bytes"], 1)
    assert first["size_bytes"] + second["size_bytes"] == described["size_bytes"] == len(two_segments)
    assert sum(block["record_count"] for block in second["blocks"]) == 3 * RECORDS_PER_BATCH


def test_damage_in_a_block_is_pointed_at(tmp_path: Path, two_segments: bytes) -> None:
    described = json.loads(_inspect(tmp_path, two_segments, "--json").stdout)
    second = described["segments"][1]
    place = second["object_at"] + second["blocks"][0]["at"]
    damaged = bytearray(two_segments)
    damaged[place + 100] ^= 0x40
    result = _inspect(tmp_path, damaged)
    assert result.exit_code == 1
    assert f"{place:,} of the object: block CRC" in result.stdout
    assert "damaged in 1 place\n" in result.stderr
    assert result.stdout.count("DAMAGED") == 1


def _inspect(folder: Path, content: bytes, *options: str) -> Result:
    file = folder / "object.seg"
    file.write_bytes(content)
    return run("segment", "inspect", str(file), *options)


@pytest.mark.parametrize("content", [b"", b"x", b"x" * 64, b"x" * 5000])
def test_what_is_no_segment_is_damaged(tmp_path: Path, content: bytes) -> None:
    result = _inspect(tmp_path, content)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")


def test_every_cut_of_a_segment_is_noticed(tmp_path: Path, two_segments: bytes) -> None:
    size = len(two_segments)
    for cut in (1, 31, 32, 33, 63, 64, 65, size // 2 + 1, size - 1, size - 33):
        assert _inspect(tmp_path, two_segments[:cut], "--json").exit_code == 1, cut


def test_segment_by_key_comes_from_the_store(tmp_path: Path, two_segments: bytes) -> None:
    import asyncio

    from shstore import StoreOptions, open_store

    async def put() -> None:
        store = open_store(StoreOptions(kind="local", path=tmp_path))
        await store.put("data/orders/0/1.seg", [two_segments])
        await store.close()

    asyncio.run(put())
    result = run("segment", "inspect", "data/orders/0/1.seg", "--store-dir", str(tmp_path), "--json")
    assert result.exit_code == 0
    assert len(json.loads(result.stdout)["segments"]) == 2
    result = run("segment", "inspect", "data/orders/0/2.seg", "--store-dir", str(tmp_path))
    assert result.exit_code == 1
    assert "no object with key" in result.stderr


def test_a_segment_of_serve_is_found_by_its_data_directory(tmp_path: Path, two_segments: bytes) -> None:
    stored = tmp_path / "objects" / "objects" / "data" / "1.seg"
    stored.parent.mkdir(parents=True)
    stored.write_bytes(two_segments)
    result = run("segment", "inspect", "data/1.seg", "--data-dir", str(tmp_path), "--json")
    assert result.exit_code == 0, result.stderr
    assert len(json.loads(result.stdout)["segments"]) == 2
    both = run("segment", "inspect", "data/1.seg", "--data-dir", str(tmp_path), "--store-dir", str(tmp_path))
    assert both.exit_code == 2 and "exclude each other" in both.stderr


@pytest.mark.parametrize("ignored", ["backup --list --keep 3", "restore --complete --accept-holes"])
def test_an_option_that_would_be_ignored_is_refused(ignored: str) -> None:
    assert run(*ignored.split()).exit_code == 2


def test_a_key_without_a_store_says_what_is_missing() -> None:
    result = run("segment", "inspect", "data/orders/0/1.seg")
    assert result.exit_code == 1
    assert "--store-dir or STREAMHOUSE_S3_*" in result.stderr


@pytest.mark.parametrize("command", ["backup", "backup --list", "restore --dry-run"])
def test_a_command_without_a_store_names_what_it_takes(command: str) -> None:
    """Neither has an option --store-dir."""
    result = run(*command.split())
    assert result.exit_code == 1
    said = "--data-dir (of `streamhouse serve`), STREAMHOUSE_STORE_DIR or STREAMHOUSE_S3_*"
    assert result.stderr == f"error: say where the object store is: {said}\n"


def test_wal_directory_is_drawn_in_order(tmp_path: Path) -> None:
    for name, frames in (("00000000000000000002.wal", 1), ("00000000000000000001.wal", 50)):
        (tmp_path / name).write_bytes(wal_bytes(frames))
    result = run("wal", "inspect", str(tmp_path))
    assert result.exit_code == 0
    assert result.stdout.index("0001.wal") < result.stdout.index("0002.wal")
    assert "10 more, shown with --all" in result.stdout
    assert "10 more" not in run("wal", "inspect", str(tmp_path), "--all").stdout
    described = json.loads(run("wal", "inspect", str(tmp_path), "--json").stdout)
    assert [item["record_count"] for item in described["files"]] == [100, 2]


def test_wal_damage_names_the_lost_offsets(tmp_path: Path) -> None:
    content = bytearray(wal_bytes(60))
    clean = json.loads(run("wal", "inspect", str(_file(tmp_path, content)), "--json").stdout)
    frame = clean["files"][0]["frames"][50]
    content[frame["at"] + frame["size_bytes"] - 1] ^= 1
    result = run("wal", "inspect", str(_file(tmp_path, content)))
    assert result.exit_code == 1
    assert f"damage at byte {frame['at']:,}" in result.stdout
    assert "offsets 100 to 102 (exclusive)" in result.stdout


def test_a_wal_file_cut_off_between_frames_is_found_by_the_next_one(tmp_path: Path) -> None:
    whole, cut = wal_bytes(3), wal_bytes(2)
    (tmp_path / "1.wal").write_bytes(cut)
    (tmp_path / "2.wal").write_bytes(encode_wal_file_header(uuid.uuid4().bytes, 2, len(whole)))
    result = run("wal", "inspect", str(tmp_path))
    assert result.exit_code == 1
    assert f"damage at byte {len(cut):,}, {len(whole) - len(cut):,} bytes: the file ends here" in result.stdout


def test_zeros_ahead_of_a_wal_file_are_damage_only_where_frames_were(tmp_path: Path) -> None:
    header = encode_wal_file_header(uuid.uuid4().bytes, 1, 0, 4096)
    frames = wal_bytes(2)[len(header) :]
    (tmp_path / "1.wal").write_bytes(header + frames + bytes(3000))
    result = run("wal", "inspect", str(tmp_path))
    assert result.exit_code == 0
    assert "3,000 bytes of zeros for the frames to come" in result.stdout and "damage" not in result.stdout
    (tmp_path / "2.wal").write_bytes(encode_wal_file_header(uuid.uuid4().bytes, 2, len(header + frames) + 3000))
    result = run("wal", "inspect", str(tmp_path))
    assert result.exit_code == 1
    assert f"damage at byte {len(header + frames):,}, 3,000 bytes: only zeros follow" in result.stdout


def test_wal_torn_tail_is_told_from_other_damage(tmp_path: Path) -> None:
    result = run("wal", "inspect", str(_file(tmp_path, wal_bytes(3)[:-1])))
    assert result.exit_code == 1
    assert "torn write" in result.stdout


def _file(folder: Path, content: bytes) -> Path:
    file = folder / "1.wal"
    file.write_bytes(content)
    return file


def test_a_directory_without_a_log_says_so(tmp_path: Path) -> None:
    result = run("wal", "inspect", str(tmp_path))
    assert result.exit_code == 1
    assert "no write-ahead log" in result.stderr
