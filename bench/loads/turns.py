"""A turn of measurements of one server: each load by its name."""

import re
from collections.abc import Callable, Sequence
from functools import partial

from bench.common import Wrong, tree_cpu_s
from bench.loads import client
from bench.peers import Peer

PARTITIONS = 4
RATES = (1_000, 20_000, 100_000)
LATENCY_RECORD_BYTES = 100
Row = dict[str, float]


def turn(peer: Peer, loads: Sequence[str], seconds: float) -> Row:
    """Starts the server, runs the loads, stops the server; returns the figures by load and name."""
    row: Row = {}
    peer.start()
    try:
        for load in loads:
            before_s = tree_cpu_s(peer.pid)
            figures = LOADS[load](peer, re.sub(r"[^a-z0-9]+", "-", load.lower()), seconds)
            figures["server_cpu_s"] = tree_cpu_s(peer.pid) - before_s
            row |= {f"{load} {name}": value for name, value in figures.items()}
    finally:
        peer.stop()
    return row


def flood(
    peer: Peer, topic: str, seconds: float, *, load: str, record_bytes: int, producers: int, partitions: int
) -> Row:
    """Returns the rate of a load that sends as fast as it can, and the client's CPU seconds per million records."""
    client.run(peer, "create", topic, partitions=partitions)
    found = client.run(peer, load, topic, seconds=seconds, record_bytes=record_bytes, producers=producers)
    millions = found["records"] / 1e6
    if not millions:
        raise Wrong(f"{peer.system} acknowledged nothing")
    return {"records/s": found["records"] / found["seconds"], "client_cpu_s_per_M": found["cpu_s"] / millions}


def delay(peer: Peer, topic: str, seconds: float, *, rate: int) -> Row:
    """Returns end-to-end delays at `rate` records a second, in ms."""
    client.run(peer, "create", topic, partitions=PARTITIONS)
    return client.latency(peer, topic, rate, seconds, LATENCY_RECORD_BYTES)


def sending(load: str, record_bytes: int, producers: int = 1, partitions: int = PARTITIONS) -> Callable[..., Row]:
    """Returns `flood` with these options."""
    return partial(flood, load=load, record_bytes=record_bytes, producers=producers, partitions=partitions)


LOADS: dict[str, Callable[[Peer, str, float], Row]] = {
    "batches of 100 B": sending("batches", 100),
    "batches of 1 KiB": sending("batches", 1024),
    "16 producers, 288 partitions": sending("batches", 100, producers=16, partitions=288),
    "send one by one": sending("one_by_one", 100),
    "unpipelined": sending("unpipelined", 100),
    **{f"end to end at {rate:,}/s": partial(delay, rate=rate) for rate in RATES},
}
