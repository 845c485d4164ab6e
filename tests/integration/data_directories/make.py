"""Keeps a small data directory of the version that a commit is, for the test that opens them all.

    python tests/integration/data_directories/make.py COMMIT

runs that version's `serve` and SDK with the packages installed now, kills it while a part of the records is in its
log alone, and writes <COMMIT>.tar.xz beside this file: `wal/` and `objects/` as they were, the database as SQL
(PostgreSQL's own files would be a hundred times larger, and reading them is PostgreSQL's promise), and
`expected.json`, what readers must find. README.md beside this file says what is different in each.
"""

import asyncio
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from shruntime.signals import restore_sigint
from streamhouse_embedded.postgres import EmbeddedPostgres
from streamhouse_embedded.postgres_system import find_bin_dir

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
READY_TIMEOUT_S = 60
KEPT = ("wal", "objects")

# Run with that version's SDK: argument is the address. Prints what was acknowledged, as JSON.
WRITE = """
import asyncio, json, sys
from streamhouse import Admin, Consumer, Producer

async def send(address, acks, numbers):
    async with Producer(address, acks=acks) as producer:
        sent = []
        for n in numbers:
            key, value = f"key-{n % 7}", json.dumps({"order": n, "text": "abc" * (n % 5)})
            headers = [("n", str(n).encode())]
            future = await producer.send("orders", key=key.encode(), value=value.encode(), headers=headers)
            sent.append((key, value, future))
        await producer.flush()
        metadata = [(key, value, await future) for key, value, future in sent]
    return [[at.partition, at.offset, key, value] for key, value, at in metadata]

async def main():
    address = sys.argv[1]
    async with Admin(address) as admin:
        await admin.create_topic("orders", partitions=2)
        await admin.create_topic("empty", partitions=1)
    records = await send(address, "durable", range(50))
    read = 0
    async with Consumer(address, ["orders"], group="billing", start="earliest") as consumer:
        async for record in consumer:
            read += 1
            if read == 30:
                break
        await consumer.commit()
    records += await send(address, "durable", range(50, 80))
    records += await send(address, "wal", range(80, 120))
    print(json.dumps({"records": sorted(records), "committed": read}))

asyncio.run(main())
"""


def sources_of(commit: str, target: Path) -> dict[str, str]:
    """Unpacks the commit's tree; returns the environment in which Python imports it before what is installed."""
    packed = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as tree:
        tree.extractall(target, filter="data")
    packages = [target / "client", target / "embedded", *(target / "libs").iterdir(), *(target / "services").iterdir()]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("STREAMHOUSE_")}
    return kept | {"PYTHONPATH": os.pathsep.join(map(str, packages)), "STREAMHOUSE_SEAL_AGE_MS": "3600000"}


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def write(environ: dict[str, str], work_dir: Path, data_dir: Path) -> str:
    """Serves the directory, writes, kills the server; returns what readers must find, as JSON."""
    address, log_path = free_address(), work_dir / "log"
    command = [sys.executable, "-m", "streamhouse_cli"]
    with log_path.open("wb") as log:
        server = subprocess.Popen(
            [*command, "serve", "--listen", address, "--data-dir", str(data_dir)],
            env=environ, cwd=work_dir, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while subprocess.run([*command, "topic", "list", "--bootstrap", address], env=environ, check=False).returncode:
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"serve is not ready:\n{log_path.read_text()}")
            time.sleep(0.5)
        written = subprocess.run([sys.executable, "-c", WRITE, address], env=environ, check=True, capture_output=True)
    finally:
        server.kill()
        server.wait()
    return written.stdout.decode()


async def dump(data_dir: Path) -> bytes:
    """The database as SQL."""
    postgres = EmbeddedPostgres(data_dir)
    dsn = await postgres.start()
    try:
        where = parse_qs(urlsplit(dsn).query)
        command = [
            find_bin_dir() / "pg_dump",
            "-h",
            where["host"][0],
            "-p",
            where["port"][0],
            "-U",
            "postgres",
            "postgres",
        ]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        content, _ = await process.communicate()
        assert process.returncode == 0, "pg_dump failed"
        return content
    finally:
        await postgres.stop()


def main() -> None:
    commit = subprocess.run(
        ["git", "rev-parse", "--short=7", sys.argv[1]], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()
    work_dir = Path(tempfile.mkdtemp(prefix="keep-data-dir-"))
    try:
        data_dir, kept = work_dir / "data", work_dir / "kept"
        expected = write(sources_of(commit, work_dir / "sources"), work_dir, data_dir)
        kept.mkdir()
        for name in KEPT:
            shutil.copytree(data_dir / name, kept / name)
        (kept / "database.sql").write_bytes(asyncio.run(dump(data_dir / "postgres")))
        (kept / "expected.json").write_text(json.dumps(json.loads(expected)))
        with tarfile.open(HERE / f"{commit}.tar.xz", "w:xz", preset=9) as packed:
            packed.add(kept, arcname=".")
    finally:
        shutil.rmtree(work_dir)


if __name__ == "__main__":
    restore_sigint()
    main()
