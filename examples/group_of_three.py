"""Shares a topic between three processes: each member of the group reads its own third of the partitions.

The members join, and once each has two of the six partitions the program sends 600 records. Every record is read by
exactly one member; what a member has read is committed when it leaves. A process that dies is noticed, and its
partitions go to the others. In earnest you start the same program on three machines, with the same group.

    python examples/group_of_three.py
"""

import argparse
import multiprocessing
import time
from collections import Counter
from multiprocessing.synchronize import Barrier

from streamhouse.sync import Admin, Consumer, Producer

TOPIC = "example-clicks"
MEMBERS, PARTITIONS, RECORDS = 3, 6, 600
# Until a member has joined and the others have given its partitions up: a few seconds, unless a member of an earlier
# run was killed. That one is waited for until its session ends.
TIMEOUT_S = 120


def member(name: str, server: str, ready: Barrier, sent: Barrier) -> None:
    """Reads the partitions that the group assigns to this process, to their end."""
    with Consumer(server, [TOPIC], group="example-group-of-three", stop_at_end=True) as consumer:
        deadline = time.monotonic() + TIMEOUT_S
        while len(consumer.assignment) != PARTITIONS // MEMBERS:
            if time.monotonic() > deadline:
                raise SystemExit(f"{name} has {sorted(consumer.assignment)} after {TIMEOUT_S} s")
            time.sleep(0.05)
        ready.wait(TIMEOUT_S)
        sent.wait(TIMEOUT_S)
        counts = Counter(record.partition for record in consumer)
    print(f"{name}: {counts.total()} records of partitions {sorted(counts)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="127.0.0.1:7070", help="address of streamhouse serve, or of coordinators")
    server = parser.parse_args().server

    with Admin(server) as admin:
        admin.create_topic(TOPIC, partitions=PARTITIONS, if_not_exists=True)

    # "spawn", because connections do not survive a fork.
    context = multiprocessing.get_context("spawn")
    ready, sent = context.Barrier(MEMBERS + 1), context.Barrier(MEMBERS + 1)
    members = [
        context.Process(target=member, args=(f"member-{n + 1}", server, ready, sent), daemon=True)
        for n in range(MEMBERS)
    ]
    for process in members:
        process.start()
    ready.wait(TIMEOUT_S)
    with Producer(server) as producer:
        for n in range(RECORDS):
            producer.send(TOPIC, b"click %d" % n, partition=n % PARTITIONS)
    sent.wait(TIMEOUT_S)
    for process in members:
        process.join(TIMEOUT_S)
    if failed := [process.name for process in members if process.exitcode != 0]:
        raise SystemExit(f"failed: {', '.join(failed)}")
    print(f"{RECORDS} records sent, each read by one of {MEMBERS} members")


if __name__ == "__main__":
    main()
