"""Sets records aside that cannot be processed: they go to `<topic>.dead-letter`, and the rest goes on.

A dead letter is the record as it was, bytes and all, with headers that say what went wrong and where it came from. It
is acknowledged before its offset is committed: a crash may write a dead letter twice, and never loses one. Only errors
of the record itself belong there. Where the database is away the program must wait, or every record is a dead letter.

    python examples/dead_letters.py
    streamhouse consume example-invoices.dead-letter --json
"""

import argparse
import json

from streamhouse import Record
from streamhouse.sync import Admin, Consumer, Producer

TOPIC = "example-invoices"
DEAD_LETTERS = f"{TOPIC}.dead-letter"
SAMPLES = [
    b'{"id": 1, "cents": 1250}',
    b"not JSON",
    b'{"id": 2}',
    b'{"id": 3, "cents": 700}',
    b'{"id": 4, "cents": "?"}',
]


def process(record: Record) -> int:
    """Returns the cents of an invoice. Raises ValueError, KeyError or TypeError for a record that is none."""
    invoice = json.loads(record.value or b"")
    return int(invoice["cents"])


def set_aside(producer: Producer, record: Record, error: Exception) -> None:
    """Writes the record to the dead letters; returns once it is acknowledged."""
    headers = [
        *record.headers,
        ("error.class", type(error).__name__.encode()),
        ("error.message", str(error).encode()),
        ("source.topic", record.topic.encode()),
        ("source.partition", b"%d" % record.partition),
        ("source.offset", b"%d" % record.offset),
    ]
    producer.send_and_wait(
        DEAD_LETTERS, record.value, key=record.key, headers=headers, timestamp_ms=record.timestamp_ms
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="127.0.0.1:7070", help="address of streamhouse serve, or of coordinators")
    server = parser.parse_args().server

    with Admin(server) as admin:
        admin.create_topic(TOPIC, partitions=2, if_not_exists=True)
        admin.create_topic(DEAD_LETTERS, partitions=1, if_not_exists=True)
    processed = cents = dead = 0
    with Producer(server, linger_ms=0) as producer:  # each dead letter is waited for: it need not linger
        producer.send_many(TOPIC, SAMPLES).result()
        with Consumer(server, [TOPIC], group="example-invoices", stop_at_end=True) as consumer:
            for record in consumer:
                try:
                    cents += process(record)
                    processed += 1
                except (ValueError, KeyError, TypeError) as error:
                    set_aside(producer, record, error)
                    dead += 1
                    print(f"dead letter: {record.topic}/{record.partition} offset {record.offset}: {error!r}")
    print(f"{processed} records processed, {cents} cents; {dead} dead letters")


if __name__ == "__main__":
    main()
