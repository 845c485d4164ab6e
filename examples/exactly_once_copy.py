"""Copies a topic into SQLite exactly once: rows and offsets are written in one transaction.

The database, not a consumer group, knows where to go on: after a crash at any moment the offsets in it belong to the
rows in it. A second copy that runs at the same time loses the race for an offset and stops, without a row written.
The offsets are kept by the topic's id, since a topic that was deleted and created again begins at 0 again.

Reading a topic and writing another one is not exactly once today: an idempotent producer writes the retries of one
process once, and a program that was killed between its writes and its commit writes them again. There are no
transactions. Such a copy is at least once, as in dead_letters.py; let the reader drop what it has seen.

    python examples/exactly_once_copy.py
"""

import argparse
import contextlib
import sqlite3

from streamhouse import RecordBatch
from streamhouse.sync import Admin, Consumer, Producer

TOPIC, PARTITIONS = "example-payments", 3
TABLES = """
CREATE TABLE IF NOT EXISTS payments (account TEXT, cents INTEGER);
CREATE TABLE IF NOT EXISTS offsets (topic_id TEXT, partition INTEGER, next INTEGER, PRIMARY KEY (topic_id, partition));
"""


def copy(database: sqlite3.Connection, topic_id: str, batch: RecordBatch) -> None:
    """Writes the rows of a batch and the offset behind it. Raises SystemExit if another copy was there first."""
    rows = [((record.key or b"").decode(), int(record.value or 0)) for record in batch]
    begin, end = int(batch.offsets[0]), int(batch.offsets[-1]) + 1
    with database:  # both, or nothing
        database.executemany("INSERT INTO payments VALUES (?, ?)", rows)
        # Offsets may jump from one batch to the next, never back.
        changed = database.execute(
            "UPDATE offsets SET next = ? WHERE topic_id = ? AND partition = ? AND next <= ?",
            (end, topic_id, batch.partition, begin),
        )
        if changed.rowcount != 1:
            raise SystemExit(f"another copy has partition {batch.partition} beyond offset {begin} already")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="127.0.0.1:7070", help="address of streamhouse serve, or of coordinators")
    parser.add_argument("--database", default="payments.sqlite")
    arguments = parser.parse_args()

    with Admin(arguments.server) as admin:
        topic = admin.create_topic(TOPIC, partitions=PARTITIONS, if_not_exists=True)
        begins = admin.offsets(TOPIC, "earliest")  # 0, until retention removes records
    with Producer(arguments.server) as producer:  # something new in each run
        for n in range(1_000):
            producer.send(TOPIC, b"%d" % n, key=b"account-%d" % (n % 7))

    with contextlib.closing(sqlite3.connect(arguments.database)) as database:
        database.executescript(TABLES)
        with database:  # partitions that are new here
            new = [(topic.topic_id, where.partition, found.offset) for where, found in begins.items()]
            database.executemany("INSERT OR IGNORE INTO offsets VALUES (?, ?, ?)", new)
        with Consumer(arguments.server, assign=list(begins), stop_at_end=True) as consumer:
            known = "SELECT partition, next FROM offsets WHERE topic_id = ?"
            for partition, offset in database.execute(known, (topic.topic_id,)).fetchall():
                consumer.seek(TOPIC, partition, offset)
            copied = 0
            for batch in consumer.batches():
                copy(database, topic.topic_id, batch)
                copied += len(batch)
        total = database.execute("SELECT count(*) FROM payments").fetchone()[0]
    print(f"{copied} records copied now, {total} rows in {arguments.database}")


if __name__ == "__main__":
    main()
