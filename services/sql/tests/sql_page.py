"""docs/sql.md as a program: its records, its statements, and the results that it shows."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
from shformat import Records
from streamhouse_sql.core.continuous.statements import ContinuousQuery, parse_job_statement

from services.sql.tests.start_sql import Result

PAGE = Path(__file__).resolve().parents[3] / "docs" / "sql.md"
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Example:
    """A statement, and what the block behind it shows: a table, or `error: …`. `line`: of the statement in the page."""

    line: int
    statement: str
    shown: str


def examples(page: str) -> list[Example]:
    """Returns the statements of the page in their order; each `sql` block has one, and a block behind it."""
    blocks = [(page.count("\n", 0, m.start()) + 2, m[1], m[2]) for m in _BLOCK.finditer(page)]
    return [
        Example(line, text.strip(), blocks[i + 1][2] if i + 1 < len(blocks) and not blocks[i + 1][1] else "")
        for i, (line, language, text) in enumerate(blocks)
        if language == "sql"
    ]


def is_live(statement: str) -> bool:
    """Returns True for a query that does not end."""
    found = parse_job_statement(statement)
    return isinstance(found, ContinuousQuery) and found.kind == "live"


def put_together(result: Result) -> Result:
    """Returns the result of a live query as if all of it had come at once."""
    rows: Counter[tuple[Any, ...]] = Counter()
    for row in result.rows:
        rows[row[1:]] += -1 if row[0] in ("-U", "-D") else 1
    assert all(count >= 0 for count in rows.values()), "a row is taken back after it was there"
    left = sorted(rows.elements(), key=str)
    table = pa.Table.from_pylist([dict(zip(result.names, ("+I", *row), strict=True)) for row in left], result.schema)
    return Result(schema=result.schema, batches=table.to_batches())


def topics(page: str) -> dict[str, dict[int, Records]]:
    """Returns the records of the page's `json` blocks, a line for each, by topic and partition."""
    found: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for match in _BLOCK.finditer(page):
        if match[1] == "json":
            for line in match[2].splitlines():
                record = json.loads(line)
                found.setdefault(record["topic"], {}).setdefault(record["partition"], []).append(record)
    return {
        topic: {number: _records(records) for number, records in partitions.items()}
        for topic, partitions in found.items()
    }


def _records(records: list[dict[str, Any]]) -> Records:
    assert [record["offset"] for record in records] == list(range(len(records))), "offsets in their order"
    return Records.from_lists(
        [_bytes(record["value"]) for record in records],
        keys=[_bytes(record["key"]) for record in records],
        timestamps_ms=[int(datetime.fromisoformat(record["timestamp"]).timestamp() * 1000) for record in records],
        headers=[[(name, value.encode()) for name, value in record.get("headers", {}).items()] for record in records],
    )


def _bytes(value: Any) -> bytes | None:
    return value if value is None else value.encode() if isinstance(value, str) else json.dumps(value).encode()


def shown(result: Result) -> str:
    """Returns a result as the page shows it."""
    columns = [[name, *(_text(row[i]) for row in result.rows)] for i, name in enumerate(result.names)]
    widths = [max(map(len, column)) for column in columns]
    kinds = [{type(row[i]) for row in result.rows} - {type(None)} for i in range(len(columns))]
    right = [bool(kind) and kind <= {int, float, Decimal} for kind in kinds]
    lines = [
        "  ".join(
            cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(cells, widths, right, strict=True)
        ).rstrip()
        for cells in zip(*columns, strict=True)
    ]
    rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([lines[0], rule, *lines[1:], ""])


def _text(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, datetime):
        return value.isoformat(" ").replace("+00:00", " UTC" if value.tzinfo else "")
    return str(value)
