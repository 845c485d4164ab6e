"""How fast the codec is on one core, over 94-byte JSON records with keys (not one repeated byte).

Usage: python bench/codec.py [--records N] [--rounds N] [--json | --compression]. Prints medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
import zlib
from collections.abc import Callable
from typing import Any

import lz4.block
from shformat import (
    BATCH_HEADER_SIZE,
    Codec,
    Records,
    SegmentBuilder,
    decode_batch,
    decode_batches,
    encode_batch,
    encode_frame_header,
    encode_lists,
    encode_wal_file_header,
    scan_frames,
    stamp_batch,
    validate_batch,
    validate_new_batch,
)
from shformat.compression import compress, decompress

MB = 1e6
TOPIC = bytes(range(1, 17))
# Figures per record are taken over blocks as segments hold them: 10,000 of these records are 0.96 MB.
BLOCK_RECORDS = 10_000


def sample(count: int) -> Records:
    """Orders as JSON, about 87 bytes, with keys of about 9; timestamps a few milliseconds apart."""
    rng = random.Random(1)
    values, keys, timestamps, now = [], [], [], 1_700_000_000_000
    for n in range(count):
        now += rng.randrange(5)
        order = {
            "id": n,
            "amount": rng.randrange(10_000) / 100,
            "country": rng.choice(["US", "DE", "FR"]),
            "status": rng.choice(["ok", "fail"]),
            "ts": now,
        }
        values.append(json.dumps(order).encode())
        keys.append(b"user-%d" % rng.randrange(5000))
        timestamps.append(now)
    return Records.from_lists(values, keys, timestamps)


def median_s(step: Callable[[], object], rounds: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Median seconds of one call; many calls per round for steps that take microseconds."""
    step()
    started = clock()
    step()
    repeats = max(1, int(0.02 / max(clock() - started, 1e-7)))
    seconds = []
    for _ in range(rounds):
        started = clock()
        for _ in range(repeats):
            step()
        seconds.append((clock() - started) / repeats)
    return statistics.median(seconds)


def each(step: Callable[[Any], object], inputs: list[Any]) -> None:
    for one in inputs:
        step(one)


def to_rows(records: Records) -> list[tuple[int, int, bytes | None, bytes | None]]:
    columns = (records.offsets.tolist(), records.timestamps_ms.tolist())
    return list(zip(*columns, records.keys.to_list(), records.values.to_list(), strict=True))


def stamped(records: Records, size: int, codec: Codec) -> list[bytes]:
    """The records as producers' batches of `size` records, stamped by a leader."""
    parts = [records.slice(at, min(at + size, len(records))) for at in range(0, len(records), size)]
    return [stamp_batch(encode_batch(part, codec=codec), at * size, 1) for at, part in enumerate(parts)]


def wal_file(batches: list[bytes], size: int) -> bytes:
    parts = [encode_wal_file_header(TOPIC, 1)]
    for at, batch in enumerate(batches):
        parts += [encode_frame_header(TOPIC, 0, 1, at * size, size, batch), batch]
    return b"".join(parts)


def build_segment(batches: list[bytes]) -> int:
    builder = SegmentBuilder(TOPIC, 0, 1)
    for batch in batches:
        builder.add(batch)
    return builder.finish().info.size_bytes


def measure(count: int, rounds: int) -> dict[str, Any]:
    records = sample(count)
    parts = [records.slice(at, min(at + BLOCK_RECORDS, count)) for at in range(0, count, BLOCK_RECORDS)]
    plain = [encode_batch(part, codec=Codec.NONE) for part in parts]
    compressed = [encode_batch(part) for part in parts]
    payloads = [block[BATCH_HEADER_SIZE:] for block in plain]
    squeezed = [(lz4.block.compress(payload, store_size=False), len(payload)) for payload in payloads]
    payload_bytes = sum(map(len, payloads))
    decoded = [decode_batch(block) for block in plain]

    def records_per_s(step: Callable[[Any], object], inputs: list[Any]) -> float:
        return count / median_s(lambda: each(step, inputs), rounds)

    def mb_per_s(size: int, step: Callable[[], object]) -> float:
        return size / MB / median_s(step, rounds)

    def expand(one: tuple[bytes, int]) -> bytes:
        expanded: bytes = lz4.block.decompress(one[0], uncompressed_size=one[1])
        return expanded

    def squeeze(payload: bytes) -> bytes:
        compressed: bytes = lz4.block.compress(payload, store_size=False)
        return compressed

    results: dict[str, Any] = {
        "records": count,
        "bytes_per_record": round(records.size_bytes / count, 1),
        "compression_ratio": round(records.size_bytes / sum(map(len, compressed)), 2),
        "encode_records_per_s": records_per_s(lambda part: encode_batch(part, codec=Codec.NONE), parts),
        "encode_lz4_records_per_s": records_per_s(encode_batch, parts),
        "decode_columns_records_per_s": records_per_s(decode_batch, plain),
        "decode_columns_lz4_records_per_s": records_per_s(decode_batch, compressed),
        "decode_rows_records_per_s": records_per_s(lambda block: to_rows(decode_batch(block)), plain),
        "rows_of_columns_records_per_s": records_per_s(to_rows, decoded),
        "crc_mb_per_s": mb_per_s(payload_bytes, lambda: each(zlib.crc32, payloads)),
        "lz4_in_mb_per_s": mb_per_s(payload_bytes, lambda: each(squeeze, payloads)),
        "lz4_out_mb_per_s": mb_per_s(payload_bytes, lambda: each(expand, squeezed)),
    }
    values, keys, timestamps_ms = records.values.to_list(), records.keys.to_list(), records.timestamps_ms.tolist()
    for size in (1, 10, 100, 1000):
        lists = (values[:size], keys[:size], timestamps_ms[:size])
        encoded = encode_lists(*lists)
        label = f"{size}_records"
        results[f"encode_lists_us_{label}"] = median_s(lambda lists=lists: encode_lists(*lists), rounds) * 1e6  # type: ignore[misc]
        results[f"validate_new_us_{label}"] = median_s(lambda one=encoded: validate_new_batch(one), rounds) * 1e6  # type: ignore[misc]
    for size in (10, 100, 1000):
        small = stamped(records, size, Codec.LZ4)
        log = wal_file(stamped(records, size, Codec.NONE), size)
        label = f"{size}_records"
        results[f"validate_us_{label}"] = median_s(lambda one=small[0]: validate_batch(one), rounds) * 1e6  # type: ignore[misc]
        results[f"encode_us_{label}"] = (
            median_s(lambda part=records.slice(0, size): encode_batch(part), rounds) * 1e6  # type: ignore[misc]
        )
        results[f"decode_many_lz4_records_per_s_{label}"] = count / median_s(
            lambda small=small: decode_batches(small),  # type: ignore[misc]
            rounds,
        )
        results[f"stamp_us_{label}"] = median_s(lambda one=small[0]: stamp_batch(one, 7, 1), rounds) * 1e6  # type: ignore[misc]
        results[f"wal_scan_mb_per_s_{label}"] = mb_per_s(len(log), lambda log=log: sum(1 for _ in scan_frames(log)))  # type: ignore[misc]
        results[f"segment_build_mb_per_s_{label}"] = mb_per_s(
            records.size_bytes,
            lambda small=small: build_segment(small),  # type: ignore[misc]
        )
    return results


def compression(count: int, rounds: int) -> list[tuple[str, float, float, float]]:
    """Returns of each codec: its name, the ratio, and MB of payload per second of CPU time in and out, for blocks of
    1 MB. CPU time, so that other work on the machine does not count."""
    records = sample(count)
    parts = [records.slice(at, min(at + BLOCK_RECORDS, count)) for at in range(0, count, BLOCK_RECORDS)]
    payloads = [encode_batch(part, codec=Codec.NONE)[BATCH_HEADER_SIZE:] for part in parts]
    size_bytes = sum(map(len, payloads))
    rows = []
    for codec in Codec:
        stored = [(b"".join(compress([payload], codec)[1]), len(payload)) for payload in payloads]
        ratio = size_bytes / sum(len(one) for one, _ in stored)

        def squeeze(payload: bytes, codec: Codec = codec) -> object:
            return compress([payload], codec)

        def expand(one: tuple[bytes, int], codec: Codec = codec) -> object:
            return decompress(memoryview(one[0]), codec, one[1])

        squeeze_s = median_s(lambda step=squeeze: each(step, payloads), rounds, time.thread_time)  # type: ignore[misc]
        expand_s = median_s(lambda step=expand, stored=stored: each(step, stored), rounds, time.thread_time)  # type: ignore[misc]
        rows.append((codec.name.lower(), ratio, size_bytes / MB / squeeze_s, size_bytes / MB / expand_s))
    return rows


def print_compression(rows: list[tuple[str, float, float, float]]) -> None:
    """As a table for docs/client.md; what takes no work (none) has no speed."""
    print("| compression | ratio | compress | decompress |\n|---|---|---|---|")
    for name, ratio, squeezed, expanded in rows:
        speeds = ("-", "-") if name == "none" else (f"{squeezed:,.0f} MB/s", f"{expanded:,.0f} MB/s")
        print(f'| `"{name}"` | {ratio:.1f} | {speeds[0]} | {speeds[1]} |')


def show(name: str, value: float) -> str:
    if "records_per_s" in name:
        return f"{value / 1e6:.2f} M records/s"
    if "_mb_per_s" in name:
        return f"{value:,.0f} MB/s"
    if "_us_" in name:
        return f"{value:.1f} us"
    return f"{value:,}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--records", type=int, default=100_000, help="records in the sample (default 100000)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds per figure, the median counts (default 7)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--compression", action="store_true", help="compare the codecs instead, as a table")
    arguments = parser.parse_args()
    if arguments.records < 1000 or arguments.rounds < 1:
        parser.error("--records must be at least 1000, --rounds at least 1")
    if arguments.compression:
        print_compression(compression(arguments.records, arguments.rounds))
        return
    results = measure(arguments.records, arguments.rounds)
    if arguments.json:
        print(json.dumps(results))
        return
    for name, value in results.items():
        print(f"{name:<42} {show(name, value):>20}")


if __name__ == "__main__":
    main()
