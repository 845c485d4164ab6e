"""Reads the records between two times: `start` and `end` of a consumer take datetimes.

A time is looked up in the index: nothing before it is read. Each partition is read from its first record at or after
`start` up to its first record at or after `end`. Times are those of the records, which their producers set, and so
need not ascend: a record that came late lies where it came. Where that happens read from a little earlier to a little
later, and look at `record.timestamp_ms`, as here.

    python examples/read_by_time.py
    python examples/read_by_time.py --begin 2024-05-01T10:30 --end 2024-05-01T11:00
"""

import argparse
from datetime import UTC, datetime, timedelta

from streamhouse.sync import Admin, Consumer, Producer

TOPIC = "example-temperatures"
FIRST = datetime(2024, 5, 1, 10, tzinfo=UTC)
LATE = timedelta(minutes=5)


def utc(text: str) -> datetime:
    """Returns an ISO 8601 time, UTC unless it says otherwise: the client refuses times without a zone."""
    time = datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def fill(server: str) -> None:
    """Creates the topic, and if it is empty sends a record for each minute of two hours, of which one comes late."""
    with Admin(server) as admin:
        admin.create_topic(TOPIC, partitions=1, if_not_exists=True)
        is_empty = not any(end.offset for end in admin.offsets(TOPIC, "latest").values())
    if is_empty:
        minutes = [*range(33), *range(34, 36), 33, *range(36, 120)]
        with Producer(server) as producer:
            producer.send_many(
                TOPIC,
                [b"%.1f" % (15 + minute / 60) for minute in minutes],
                timestamps_ms=[FIRST + timedelta(minutes=minute) for minute in minutes],
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="127.0.0.1:7070", help="address of streamhouse serve, or of coordinators")
    parser.add_argument("--begin", type=utc, default=FIRST + timedelta(minutes=33))
    parser.add_argument("--end", type=utc, default=FIRST + timedelta(minutes=36), help="the first time not wanted")
    arguments = parser.parse_args()
    begin, end = arguments.begin, arguments.end
    fill(arguments.server)

    found = []
    with Consumer(arguments.server, [TOPIC], start=begin - LATE, end=end + LATE, stop_at_end=True) as consumer:
        for record in consumer:
            time = datetime.fromtimestamp(record.timestamp_ms / 1000, UTC)
            if begin <= time < end:
                found.append((time, record.offset, record.value))
    for time, offset, value in sorted(found):
        print(f"{time:%H:%M} offset {offset}: {(value or b'').decode()} °C")
    print(f"{len(found)} records from {begin:%H:%M} to before {end:%H:%M}")


if __name__ == "__main__":
    main()
