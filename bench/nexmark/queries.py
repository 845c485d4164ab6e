"""The queries of Nexmark in StreamHouse's SQL, and the tables that they read. See docs/nexmark.md."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).with_name("queries")
NAMES = tuple(f"q{number}" for number in range(24))
# Topics of each query's input, and of the small table that q13 has beside it.
TOPICS = ("person", "auction", "bid", "side_input")


def declarations() -> list[str]:
    """Returns the CREATE TABLE statements."""
    return [text for text in (FOLDER / "tables.sql").read_text().split(";") if text.strip()]


def statement(name: str) -> str:
    """Returns the INSERT INTO … SELECT of a query."""
    return (FOLDER / f"{name}.sql").read_text()
