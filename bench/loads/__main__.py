"""A client process: runs a load, prints its figures and its own CPU seconds as a line of JSON."""

import argparse
import json
import time
from dataclasses import asdict
from importlib import import_module

import numpy as np

from bench.loads import Paced, System
from bench.loads.records import make_records

SYSTEMS = {"streamhouse": ("bench.loads.streamhouse", "StreamHouse"), "kafka": ("bench.loads.kafka", "Kafka")}
"""Imported when asked for: Kafka's client is no package of the project."""

BEGAN = "began"
"""The line that `listen` prints once nothing that comes can pass it by."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("address")
    parser.add_argument("load", choices=("create", "batches", "one_by_one", "unpipelined", "pace", "listen"))
    parser.add_argument("--topic", required=True)
    parser.add_argument("--partitions", type=int, default=4)
    parser.add_argument("--producers", type=int, default=1)
    parser.add_argument("--record-bytes", type=int, default=100)
    parser.add_argument("--records-per-s", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    module, name = SYSTEMS[options.system]
    system: System = getattr(import_module(module), name)(options.address)
    values = make_records(options.record_bytes) if options.load in ("batches", "one_by_one", "unpipelined") else []
    before_s = time.process_time()
    figures = run(system, values, options)
    print(json.dumps({**figures, "cpu_s": time.process_time() - before_s}))


def run(system: System, values: list[bytes], options: argparse.Namespace) -> dict[str, float]:
    """Runs one load; returns its figures by name."""
    paced = Paced(options.records_per_s, options.seconds, options.record_bytes)
    match options.load:
        case "create":
            system.create_topic(options.topic, options.partitions)
            return {}
        case "batches":
            return asdict(system.batches(options.topic, values, options.seconds, options.producers))
        case "one_by_one":
            return asdict(system.one_by_one(options.topic, values, options.seconds))
        case "unpipelined":
            return asdict(system.unpipelined(options.topic, values, options.seconds))
        case "pace":
            return asdict(system.pace(options.topic, paced))
        case _:
            delays = system.listen(options.topic, paced.records, lambda: print(BEGAN, flush=True))
            names = ("p50_ms", "p99_ms", "p999_ms", "max_ms")
            measured = np.percentile(delays[paced.warm_up_records :], [50, 99, 99.9, 100])
            return dict(zip(names, measured.tolist(), strict=True))


if __name__ == "__main__":
    main()
