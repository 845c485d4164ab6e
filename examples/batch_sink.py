"""Writes a topic into SQLite in batches: 1,000 records or 2 seconds, whatever comes first, are one transaction.

The order is what matters: the transaction first, then the commit of the group's offsets. A crash between the two means
that the batch is read again; its rows are known by topic, partition and offset, so that writing them again changes
nothing. Rows are neither lost nor doubled.

    python examples/batch_sink.py               # fills the topic once, writes what is new, ends
    python examples/batch_sink.py --follow      # goes on until Ctrl-C
"""

import argparse
import contextlib
import sqlite3
import time
from collections.abc import Iterator

from streamhouse import Record
from streamhouse.sync import Admin, Consumer, Producer

TOPIC = "example-readings"
TABLE = """
CREATE TABLE IF NOT EXISTS readings (
    topic TEXT, partition INTEGER, offset INTEGER, sensor TEXT, value INTEGER, PRIMARY KEY (topic, partition, offset)
)
"""


def fill(server: str) -> None:
    """Creates the topic, and sends 2,500 records if it is empty."""
    with Admin(server) as admin:
        admin.create_topic(TOPIC, partitions=3, if_not_exists=True)
        is_empty = not any(end.offset for end in admin.offsets(TOPIC, "latest").values())
    if is_empty:
        with Producer(server) as producer:
            keys = [b"sensor-%d" % (n % 10) for n in range(2_500)]
            producer.send_many(TOPIC, [b"%d" % n for n in range(2_500)], keys=keys)


def batches(consumer: Consumer, records_max: int, seconds_max: float) -> Iterator[list[Record]]:
    """Yields lists of at most records_max records, none of which waits longer than seconds_max for the others."""
    batch: list[Record] = []
    deadline = time.monotonic() + seconds_max
    while not consumer.at_end:
        left_ms = max(0, round((deadline - time.monotonic()) * 1000))
        polled = consumer.poll(timeout_ms=left_ms, max_records=records_max - len(batch))
        batch += [record for records in polled.values() for record in records]
        if len(batch) == records_max or time.monotonic() >= deadline:
            if batch:
                yield batch
            batch, deadline = [], time.monotonic() + seconds_max
    if batch:
        yield batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="127.0.0.1:7070", help="address of streamhouse serve, or of coordinators")
    parser.add_argument("--database", default="readings.sqlite")
    parser.add_argument("--records", type=int, default=1_000, help="a batch has at most so many records")
    parser.add_argument("--seconds", type=float, default=2.0, help="a batch waits at most so long")
    parser.add_argument("--follow", action="store_true", help="go on at the end of the topic, until Ctrl-C")
    arguments = parser.parse_args()
    fill(arguments.server)

    database = sqlite3.connect(arguments.database)
    database.execute(TABLE)
    with (
        contextlib.closing(database),
        contextlib.suppress(KeyboardInterrupt),  # what is not written yet is not committed either
        Consumer(
            arguments.server, [TOPIC], group="example-sink", auto_commit=False, stop_at_end=not arguments.follow
        ) as consumer,
    ):
        for batch in batches(consumer, arguments.records, arguments.seconds):
            rows = [(r.topic, r.partition, r.offset, (r.key or b"").decode(), int(r.value or 0)) for r in batch]
            with database:  # one transaction
                database.executemany("INSERT OR IGNORE INTO readings VALUES (?, ?, ?, ?, ?)", rows)
            consumer.commit()  # everything polled so far
            print(f"{len(rows)} records written and committed", flush=True)
    print("done")


if __name__ == "__main__":
    main()
