"""Results of SQL statements as bytes: a table, JSON lines, CSV, an Arrow stream, a Parquet file. Pure.

A format gives bytes for each batch as it comes, and keeps none of them, but for the rows of one row group of Parquet.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from shruntime.text import escaped

from streamhouse_cli.sql_values import is_number, json_texts, quoted, texts

if TYPE_CHECKING:
    import pyarrow

NULL = "NULL"
# A column is not made wider than this for its longest value: the value itself is shown whole, its row is longer.
PADDED_WIDTH_MAX = 60
# DuckDB's, and about the size that readers of Parquet work on at a time; the bytes bound the memory of wide rows.
ROW_GROUP_ROWS = 122_880
ROW_GROUP_BYTES = 64 * 1024 * 1024
# A field of CSV that readers take as it is, also those that strip blanks.
_UNQUOTED = re.compile(r'[^\s",](?:[^",\r\n]*[^\s",])?')
# Formats of bytes, which no terminal can show.
BINARY = ("arrow", "parquet")
FORMATS = ("table", "json", "csv", *BINARY)


class Format(Protocol):
    """Bytes of one result: those of each batch, in order, and those at the end, also of a result without rows."""

    def batch(self, batch: pyarrow.RecordBatch) -> bytes: ...
    def end(self, schema: pyarrow.Schema) -> bytes: ...


def new_format(name: str, *, expanded: bool = False, styled: bool = False, terminal: bool = False) -> Format:
    """Returns the format for one result. expanded: a table has a line per value. styled: with bold and dim characters.
    terminal: the result is shown by a terminal, which obeys control characters."""
    if name == "table":
        return Expanded(styled) if expanded else Table(styled)
    if name == "csv":
        return Csv(terminal)
    if name == "json":
        return JsonLines()
    return ArrowStream() if name == "arrow" else Parquet()


# ---- for people


class _Style:
    """Characters for headers and nulls, on a terminal with the style of both."""

    def __init__(self, styled: bool) -> None:
        self._styled = styled

    def bold(self, text: str) -> str:
        return self._rendered("bold", text)

    def dim(self, text: str) -> str:
        return self._rendered("dim", text)

    def _rendered(self, style: str, text: str) -> str:
        if not self._styled:
            return text
        from rich.style import Style

        return Style.parse(style).render(text)


class Table:
    """Rows under the names of their columns. The first batch decides about the widths of the columns."""

    def __init__(self, styled: bool = False) -> None:
        self._style = _Style(styled)
        self._null = self._style.dim(NULL)
        self._widths: list[int] = []
        self._right: list[bool] = []
        self._row_count = 0

    def batch(self, batch: pyarrow.RecordBatch) -> bytes:
        """Returns the lines of the rows, before the first the header."""
        self._row_count += batch.num_rows
        return self.rows(list(batch.schema), [cells_of(column) for column in batch.columns])

    def rows(self, fields: Sequence[pyarrow.Field], columns: list[list[str | None]]) -> bytes:
        """Returns the lines of rows, given as the texts of each column, before the first the header."""
        head = b"" if self._widths else self._head(fields, columns)
        if not columns:
            return b""
        padded = [self._padded(cells, at) for at, cells in enumerate(columns)]
        return head + "".join([f"{row.rstrip(' ')}\n" for row in map("  ".join, zip(*padded, strict=True))]).encode()

    def end(self, schema: pyarrow.Schema) -> bytes:
        """Returns the number of rows, and for a result without rows the header; nothing without columns."""
        if not schema:
            return b""
        head = b"" if self._widths else self._head(list(schema), [[] for _ in schema])
        return head + f"({row_count_text(self._row_count)})\n".encode()

    def _head(self, fields: Sequence[pyarrow.Field], columns: list[list[str | None]]) -> bytes:
        names = [escaped(field.name) for field in fields]
        self._right = [is_number(field.type) for field in fields]
        self._widths = [
            max(_width(name), min(PADDED_WIDTH_MAX, max((_width(cell or NULL) for cell in cells), default=0)))
            for name, cells in zip(names, columns, strict=True)
        ]
        if not names:
            return b""
        shown = [self._padded([name], at, self._style.bold)[0] for at, name in enumerate(names)]
        rule = "─" * (sum(self._widths) + 2 * len(names) - 2)
        return f"{'  '.join(shown).rstrip(' ')}\n{rule}\n".encode()

    def _padded(self, cells: list[str | None], at: int, style: Callable[[str], str] | None = None) -> list[str]:
        """Returns the cells of column `at` as wide as the column, or wider."""
        width, right = self._widths[at], self._right[at]
        if style is None and self._null == NULL:
            cells = [NULL if cell is None else cell for cell in cells]
            if "".join(filter(None, cells)).isascii():
                return [f"{cell:>{width}}" if right else f"{cell:<{width}}" for cell in cells]
        shown = []
        for cell in cells:
            blank = " " * (width - _width(NULL if cell is None else cell))
            text = self._null if cell is None else cell if style is None else style(cell)
            shown.append(blank + text if right else text + blank)
        return shown


class Expanded:
    """A block per row, in it a line per value: for rows that are wider than a screen."""

    def __init__(self, styled: bool = False) -> None:
        self._style = _Style(styled)
        self._null = self._style.dim(NULL)
        self._row_count = 0

    def batch(self, batch: pyarrow.RecordBatch) -> bytes:
        """Returns the blocks of the rows."""
        names = [escaped(name) for name in batch.schema.names]
        width = max(map(_width, names), default=0)
        heads = [self._style.bold(name) + " " * (width - _width(name)) for name in names]
        lines = []
        for row in zip(*[cells_of(column) for column in batch.columns], strict=True):
            self._row_count += 1
            lines.append(self._style.dim(f"─[ row {self._row_count} ]".ljust(max(width + 20, 20), "─")))
            lines += [f"{head}  {self._null if cell is None else cell}" for head, cell in zip(heads, row, strict=True)]
        return "".join(f"{line}\n" for line in lines).encode()

    def end(self, schema: pyarrow.Schema) -> bytes:
        """Returns the number of rows; nothing without columns."""
        return f"({row_count_text(self._row_count)})\n".encode() if schema else b""


def row_count_text(count: int) -> str:
    """Returns "1 row" or "N rows"."""
    return f"{count:,} row{'' if count == 1 else 's'}"


def cells_of(column: pyarrow.Array) -> list[str | None]:
    """Returns the values as text of a single line, without characters that a terminal would obey."""
    found = texts(column)
    if "".join(filter(None, found)).isprintable():
        return found
    return [None if text is None else text if text.isprintable() else escaped(text) for text in found]


def _width(text: str) -> int:
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


# ---- for programs


class JsonLines:
    """An object per row and line. Of columns with the same name the second is `name_2`."""

    def __init__(self) -> None:
        self._line = ""

    def batch(self, batch: pyarrow.RecordBatch) -> bytes:
        """Returns the lines of the rows."""
        if not self._line:
            names = [quoted(name).replace("%", "%%") for name in _distinct(batch.schema.names)]
            self._line = "{" + ",".join(f"{name}:%s" for name in names) + "}\n"
        columns = [json_texts(column) for column in batch.columns]
        columns = [
            ["null" if text is None else text for text in found] if None in found else found for found in columns
        ]
        return "".join(map(self._line.__mod__, zip(*columns, strict=True))).encode()

    def end(self, schema: pyarrow.Schema) -> bytes:
        return b""


def _distinct(names: list[str]) -> list[str]:
    """Returns the names, each made another by a number behind it if it was there before."""
    found: dict[str, None] = {}
    for name in names:
        number, distinct = 1, name
        while distinct in found:
            number += 1
            distinct = f"{name}_{number}"
        found[distinct] = None
    return list(found)


class Csv:
    """Comma-separated values with a header (RFC 4180), lines ended by LF. A null is nothing, an empty text is ""."""

    def __init__(self, terminal: bool = False) -> None:
        self._terminal = terminal
        self._has_head = False

    def batch(self, batch: pyarrow.RecordBatch) -> bytes:
        """Returns the lines of the rows, before the first the header."""
        columns = [_csv_fields(texts(column)) for column in batch.columns]
        return self._head(batch.schema) + self._lines(zip(*columns, strict=True))

    def end(self, schema: pyarrow.Schema) -> bytes:
        """Returns the header of a result without rows."""
        return self._head(schema)

    def _head(self, schema: pyarrow.Schema) -> bytes:
        if self._has_head or not schema:
            return b""
        self._has_head = True
        return self._lines([_csv_fields(schema.names)])

    def _lines(self, rows: Any) -> bytes:
        data = "".join([f"{line}\n" for line in map(",".join, rows)])
        return ("".join(map(_shown, data)) if self._terminal and not data.isprintable() else data).encode()


def _csv_fields(values: Sequence[str | None]) -> list[str]:
    # csv.writer writes a null and an empty text alike, up to Python 3.11.
    return ["" if text is None else text if _UNQUOTED.fullmatch(text) else _csv_quoted(text) for text in values]


def _csv_quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def _shown(char: str) -> str:
    return char if char in "\n\t" else escaped(char)


class _Written(io.RawIOBase):
    """A file for pyarrow's writers, which keeps what was written until `take`."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def write(self, data: Any) -> int:
        part = bytes(data)
        self._parts.append(part)
        self._size += len(part)
        return len(part)

    def take(self) -> bytes:
        """Returns the bytes written since the last call."""
        parts, self._parts = self._parts, []
        return b"".join(parts)


class ArrowStream:
    """Arrow's IPC stream, as pyarrow.ipc.open_stream reads it."""

    def __init__(self) -> None:
        self._file = _Written()
        self._writer: Any = None

    def batch(self, batch: pyarrow.RecordBatch) -> bytes:
        """Returns the message of the batch, before the first the schema."""
        self._begin(batch.schema)
        self._writer.write_batch(batch)
        return self._file.take()

    def end(self, schema: pyarrow.Schema) -> bytes:
        """Returns the end of the stream."""
        self._begin(schema)
        self._writer.close()
        return self._file.take()

    def _begin(self, schema: pyarrow.Schema) -> None:
        from pyarrow import ipc

        if self._writer is None:
            self._writer = ipc.new_stream(self._file, schema)


class Parquet:
    """A Parquet file. Rows are gathered to row groups of ROW_GROUP_ROWS or ROW_GROUP_BYTES."""

    def __init__(self) -> None:
        self._file = _Written()
        self._writer: Any = None
        self._batches: list[pyarrow.RecordBatch] = []
        self._row_count = self._size_bytes = 0

    def batch(self, batch: pyarrow.RecordBatch) -> bytes:
        """Returns the row group that the batch completes, or nothing."""
        self._batches.append(batch)
        self._row_count += batch.num_rows
        self._size_bytes += batch.nbytes
        if self._row_count < ROW_GROUP_ROWS and self._size_bytes < ROW_GROUP_BYTES:
            return b""
        self._write(batch.schema)
        return self._file.take()

    def end(self, schema: pyarrow.Schema) -> bytes:
        """Returns the last row group and the footer."""
        self._write(schema)
        self._writer.close()
        return self._file.take()

    def _write(self, schema: pyarrow.Schema) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        if self._writer is None:
            self._writer = parquet.ParquetWriter(self._file, schema)
        if self._batches:
            self._writer.write_table(pa.Table.from_batches(self._batches), row_group_size=ROW_GROUP_ROWS)
        self._batches, self._row_count, self._size_bytes = [], 0, 0
