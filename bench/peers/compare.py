"""StreamHouse beside Apache Kafka on this machine: `make bench-peers`.

The same loads (bench/loads) on each, in turns, round by round: each turn starts the server on an empty directory and
ends it. StreamHouse acknowledges from its fsynced log, Kafka from the page cache (its default), and once more with an
fsync before each acknowledgement. Shown: medians of the rounds, ratios, CPU seconds of server and clients.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from shruntime.signals import restore_sigint

from bench.common import console, print_table, run, write_json
from bench.loads.turns import LOADS, Row, turn
from bench.peers import Peer
from bench.peers.kafka import KafkaBroker
from bench.peers.streamhouse import StreamHouseServer

PEERS: dict[str, Callable[[Path], Peer]] = {
    "streamhouse": StreamHouseServer,
    "kafka": partial(KafkaBroker, flush_each=False),
    "kafka-fsync": partial(KafkaBroker, flush_each=True),
}


def main() -> int:
    options = parse_options()
    return run(lambda: measure(options))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each, of which medians are shown (%(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long each load runs (%(default)s)")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="which (all)")
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS), help="which (all)")
    parser.add_argument("--dir", type=Path, help="where the data goes; the disk under it is what is measured")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    if options.rounds < 1 or options.seconds <= 0:
        parser.error("--rounds and --seconds must be positive")
    return options


async def measure(options: argparse.Namespace) -> None:
    rounds: dict[str, list[Row]] = {name: [] for name in options.peers}
    with tempfile.TemporaryDirectory(prefix="streamhouse-bench-", dir=options.dir) as folder:
        for number in range(options.rounds):
            for name in options.peers:
                peer = PEERS[name](Path(folder) / f"{name}-{number}")
                rounds[name].append(await asyncio.to_thread(turn, peer, options.loads, options.seconds))
                console.print(f"round {number + 1} of {options.rounds}: {name} done")
    show(rounds, options.loads)
    write_json(options.json, vars(options), rounds)


# ---- results


def show(rounds: dict[str, list[Row]], loads: Sequence[str]) -> None:
    """Prints a table for each load: the medians of all peers, and ratios to the first."""
    first, *others = rounds
    columns = ["", *rounds, *(f"{first} : {peer}" for peer in others)]
    for load in loads:
        names = [name for name in rounds[first][0] if name.startswith(f"{load} ")]
        rows = []
        for name in names:
            medians = {peer: statistics.median(row[name] for row in turns) for peer, turns in rounds.items()}
            cells = [f"{median:,.2f}" for median in medians.values()]
            cells += [_ratio(medians[first], medians[peer]) for peer in others]
            rows.append([name.removeprefix(f"{load} "), *cells])
        print_table(f"{load}: medians of {len(rounds[first])}", columns, rows)


def _ratio(ours: float, theirs: float) -> str:
    return f"{ours / theirs:.2f}" if theirs else "-"


if __name__ == "__main__":
    restore_sigint()
    sys.exit(main())
