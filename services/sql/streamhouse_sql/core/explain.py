"""EXPLAIN: the ranges that a scan reads, and what a continuous query does and keeps, in words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from streamhouse_sql.core.binding import TopicScan
from streamhouse_sql.core.continuous.model import JobPlan

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


def explained_job(plan: JobPlan) -> list[str]:
    """Returns the lines about what a continuous query computes, reads and keeps."""
    emit = "each window when it is over" if plan.emit_on_close else "each change at once"
    lines = [f"result: {emit}{', as a changelog' if plan.is_changelog else ''}"]
    if plan.key_columns:
        lines.append(f"  key of the result: {', '.join(plan.key_columns)}")
    lines += [f"  {operator}" for operator in plan.operators]
    for source in plan.inputs:
        watermark = ", with a watermark" if source.has_watermark else ""
        lines.append(f"input topic {source.topic}{watermark}; columns decoded: {', '.join(source.columns)}")
    for info in plan.state:
        bound = info.bound or "nothing: it grows with the number of distinct keys"
        lines.append(f"state {info.table} of {info.operator}: {info.holds}; bounded by {bound}")
    return [*lines, *(f"WARNING: {warning}" for warning in plan.warnings)]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _time(timestamp_ms: int) -> str:
    return f"{np.datetime64(timestamp_ms, 'ms')} UTC".replace("T", " ", 1)
