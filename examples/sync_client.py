"""Writes and reads in plain code: the client without async.

`send` returns at once, with a future that knows offset or error once the record is acknowledged. Leaving the
producer's `with` waits for all of them and raises the first failure that nobody has looked at.

    python examples/sync_client.py
"""

import argparse

from streamhouse.errors import StreamHouseError
from streamhouse.sync import Admin, Consumer, Producer

TOPIC = "example-greetings"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="127.0.0.1:7070", help="address of streamhouse serve, or of coordinators")
    server = parser.parse_args().server

    with Admin(server) as admin:
        admin.create_topic(TOPIC, partitions=2, if_not_exists=True)

    with Producer(server) as producer:
        # One record, waited for.
        placed = producer.send_and_wait(TOPIC, b"hello", key=b"anna", headers=[("language", b"en")])
        print(f"written to partition {placed.partition} at offset {placed.offset}")
        # Many records: their batches are on the way while the loop goes on.
        futures = [producer.send(TOPIC, f"hello number {n}".encode(), key=b"bert") for n in range(100)]
        print(f"the last of 100 is at offset {futures[-1].result(timeout_s=30).offset}")
        # An error names what is wrong, here as everywhere.
        try:
            producer.send("no-such-topic", b"lost")
        except StreamHouseError as error:
            print(f"refused: {error} ({error.reason})")

    # The group goes on where its last run ended; stop_at_end makes the loop finite.
    with Consumer(server, [TOPIC], group="example-sync", stop_at_end=True) as consumer:
        count = 0
        for record in consumer:
            if count == 0:
                print(f"first: {record.key!r} {record.value!r} {dict(record.headers)}")
            count += 1
    # What was handed over is committed by leaving without an error.
    print(f"{count} records read")


if __name__ == "__main__":
    main()
