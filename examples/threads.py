"""Shares one producer and one consumer between threads.

Both clients of `streamhouse.sync` are safe to share: the records of all threads travel in common batches, and each
record is handed to exactly one of the threads that read. A commit never passes a record that some thread still works
on. Records of one partition are handed over in order, but threads may finish them in any.

    python examples/threads.py
"""

import argparse
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from streamhouse.sync import Admin, Consumer, Producer

TOPIC = "example-jobs"
THREADS, JOBS = 4, 250


def write(producer: Producer, writer: int) -> int:
    """Sends JOBS records; returns how many were acknowledged."""
    futures = [producer.send(TOPIC, b"job %d of %d" % (n, writer), key=b"%d" % n) for n in range(JOBS)]
    return sum(future.result(timeout_s=60).offset >= 0 for future in futures)


def work(consumer: Consumer, done: Counter[bytes], lock: threading.Lock) -> int:
    """Takes records until there are none left; returns how many this thread had."""
    count = 0
    for record in consumer:  # the next record that no other thread has
        with lock:
            done[record.value or b""] += 1
        count += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="127.0.0.1:7070", help="address of streamhouse serve, or of coordinators")
    server = parser.parse_args().server

    with Admin(server) as admin:
        admin.create_topic(TOPIC, partitions=4, if_not_exists=True)
    with Producer(server) as producer, ThreadPoolExecutor(THREADS) as pool:
        written = sum(pool.map(write, [producer] * THREADS, range(THREADS)))
    print(f"{written} jobs written by {THREADS} threads through one producer")

    done: Counter[bytes] = Counter()
    lock = threading.Lock()
    with (
        Consumer(server, [TOPIC], group="example-jobs", stop_at_end=True) as consumer,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        counts = list(pool.map(work, [consumer] * THREADS, [done] * THREADS, [lock] * THREADS))
    print(f"{sum(counts)} jobs done by {THREADS} threads through one consumer, {len(done)} of them different")


if __name__ == "__main__":
    main()
