"""Makes a small data directory of `streamhouse serve` and packs it: `python -m tests.released.make ARCHIVE.tar.gz`.

Run once per release, and before a change of what lies in a data directory; test_released_data.py opens all archives
with the code of today. It uses nothing but the SDK's oldest calls, so that it runs with older code as well.
"""

import asyncio
import json
import socket
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from streamhouse import Admin, Consumer, Producer
from streamhouse.errors import StreamHouseError
from streamhouse_embedded.postgres import EmbeddedPostgres
from streamhouse_embedded.postgres_system import find_bin_dir

PATIENCE_S = 120
SETTINGS = {"STREAMHOUSE_WAL_FILE_BYTES": str(1 << 20), "STREAMHOUSE_SEAL_AGE_MS": "300"}
TOPICS: dict[str, dict[str, int]] = {"orders": {"partitions": 2}, "kept": {"partitions": 1, "retention_bytes": 400}}
DELETED = "gone"
GROUP = "billing"


def main(archive: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        command = [sys.executable, "-m", "streamhouse.cli", "serve", "--data-dir", str(data), "--listen", address]
        process = subprocess.Popen(["env", *(f"{name}={value}" for name, value in SETTINGS.items()), *command])
        try:
            written = asyncio.run(asyncio.wait_for(write(address, process), PATIENCE_S))
        finally:
            process.kill()
            process.wait()
        sql = asyncio.run(dump(data / "postgres"))
        with tarfile.open(archive, "w:gz") as packed:
            for name in ("wal", "objects"):
                packed.add(data / name, name)
            for name, text in (("database.sql", sql), ("expected.json", json.dumps(written, indent=1))):
                path = Path(scratch) / name
                path.write_text(text)
                packed.add(path, name)


async def write(address: str, process: "subprocess.Popen[Any]") -> dict[str, Any]:
    """Returns what is to be found: per topic [partition, offset, value], and how far the group has read."""
    async with Admin(address) as admin:
        for name, options in {**TOPICS, DELETED: {"partitions": 1}}.items():
            await until(lambda name=name, options=options: admin.create_topic(name, **options))  # type: ignore[misc]
    records: dict[str, list[list[Any]]] = {name: [] for name in TOPICS}
    for acks in ("durable", "wal"):
        async with Producer(address, acks=acks) as producer:
            for nth in range(20):
                for topic in (*TOPICS, DELETED):
                    value = f"{topic} {acks} {nth}"
                    sent = await (await producer.send(topic, key=b"k%d" % nth, value=value.encode()))
                    if topic in records:
                        records[topic].append([sent.partition, sent.offset, value])
    async with Consumer(address, ["orders"], group=GROUP, start="earliest") as consumer:
        seen = 0
        async for _ in consumer:
            seen += 1
            if seen == 30:
                break
        await consumer.commit()
    async with Admin(address) as admin:
        await admin.delete_topic(DELETED)
    await asyncio.sleep(2)  # retention and the sweeps have a look
    async with Producer(address, acks="wal") as producer:
        for nth in range(20, 25):  # these are in the log only
            sent = await (await producer.send("orders", key=b"k%d" % nth, value=b"orders wal %d" % nth))
            records["orders"].append([sent.partition, sent.offset, f"orders wal {nth}"])
        process.kill()
    return {"records": records, "deleted": DELETED, "group": GROUP, "committed": seen}


async def until(call: Any) -> None:
    while True:
        try:
            await call()
            return
        except (StreamHouseError, OSError):
            await asyncio.sleep(0.2)


async def dump(postgres: Path) -> str:
    """The database as SQL: PostgreSQL's own files are large, and of one version and machine."""
    server = EmbeddedPostgres(postgres)
    dsn = await server.start()
    try:
        command = [str(find_bin_dir(None) / "pg_dump"), "--inserts", "--no-owner", "--no-privileges", dsn]
        text = (await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True, text=True)).stdout
    finally:
        await server.stop()
    return "\n".join(line for line in text.splitlines() if not line.startswith("\\"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
