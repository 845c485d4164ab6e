"""EXPLAIN: the ranges that a scan reads, in words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from streamhouse_sql.core.binding import TopicScan

PARTITIONS_SHOWN = 16


def explained(scan: TopicScan, ranges: Sequence[tuple[int, int, int]], timestamp_min_ms: int | None) -> list[str]:
    """Returns the lines about a scan. `ranges`: (partition, first offset, end offset)."""
    records = sum(end - first for _, first, end in ranges)
    lines = [
        f"scan of topic {scan.topic}: {_count(len(ranges), 'partition')}, at most {_count(records, 'record')}",
        f"  columns decoded: {', '.join(scan.columns) or 'none'}",
    ]
    if timestamp_min_ms is not None:
        lines.append(f"  segments and blocks that end before {_time(timestamp_min_ms)} are left out")
    lines += [f"  partition {number}: offsets {first} to {end}" for number, first, end in ranges[:PARTITIONS_SHOWN]]
    if len(ranges) > PARTITIONS_SHOWN:
        lines.append(f"  and {_count(len(ranges) - PARTITIONS_SHOWN, 'partition')} more")
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _time(timestamp_ms: int) -> str:
    return f"{np.datetime64(timestamp_ms, 'ms')} UTC".replace("T", " ", 1)
