"""Cuts a stream of bytes into lines or CSV rows, and makes records of these. Pure: no files, no network."""

from __future__ import annotations

import base64
import binascii
import csv
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# A record of 16 MiB less 64 KiB fits a batch, and less 64 KiB again leaves room for key and headers. A longer line is
# not text, or not meant as a record.
LINE_BYTES_MAX = 16 * 1024 * 1024 - 128 * 1024
# JSON writes a control character as six bytes (\u0001), so the largest record takes six times its size.
JSON_LINE_BYTES_MAX = 6 * 16 * 1024 * 1024

# Formats without lines, by their first bytes, and the command that makes lines of them.
_MAGICS = {
    b"\x1f\x8b\x08": ("gzip data", "`zcat FILE | streamhouse produce …`"),
    b"\x28\xb5\x2f\xfd": ("zstd data", "`zstdcat FILE | streamhouse produce …`"),
    b"\x04\x22\x4d\x18": ("LZ4 data", "`lz4cat FILE | streamhouse produce …`"),
    b"\xfd7zXZ\x00": ("xz data", "`xzcat FILE | streamhouse produce …`"),
    b"BZh91AY&SY": ("bzip2 data", "`bzcat FILE | streamhouse produce …`"),
    b"PK\x03\x04": ("a zip archive", "`unzip -p FILE | streamhouse produce …`"),
    b"PAR1": ("a Parquet file", "rows written as JSON lines or CSV"),
    b"ARROW1\x00\x00": ("an Arrow file", "rows written as JSON lines or CSV"),
    b"Obj\x01": ("an Avro file", "rows written as JSON lines or CSV"),
}


class LineTooLong(ValueError):
    """A line is over its limit."""


class UnfinishedRow(ValueError):
    """The input ends inside a quoted field."""


class BinaryInput(ValueError):
    """The input begins as a compressed or columnar file does."""


class BadHeader(ValueError):
    """The first row of CSV does not name the requested column."""


class MagicCheck:
    """Refuses input that begins as a compressed or columnar file does: bytes between newlines are no records there."""

    def __init__(self) -> None:
        self._head = b""
        self._decided = False

    def feed(self, chunk: bytes) -> bytes:
        """Returns the bytes that are checked; the first few, which may still become a magic number, are held back until
        more come. Raises BinaryInput."""
        if self._decided:
            return chunk
        self._head += chunk
        for magic, (name, instead) in _MAGICS.items():
            if self._head.startswith(magic):
                raise BinaryInput(
                    f"the input is {name}, not lines: produce takes {instead}; --allow-binary sends it as it is"
                )
        if any(magic.startswith(self._head) for magic in _MAGICS):
            return b""
        return self.finish()

    def finish(self) -> bytes:
        """Returns the bytes held back."""
        head, self._head, self._decided = self._head, b"", True
        return head


class LineSplitter:
    """Cuts chunks at newlines; bytes behind the last newline are held back for the next chunk."""

    def __init__(self, line_bytes_max: int = LINE_BYTES_MAX) -> None:
        self._line_bytes_max = line_bytes_max
        self._unfinished: list[bytes] = []
        self._unfinished_bytes = 0

    def feed(self, chunk: bytes) -> list[bytes]:
        """Returns the lines that end in `chunk`, without their newlines. Raises LineTooLong."""
        *lines, rest = chunk.split(b"\n")
        if lines:
            lines[0] = b"".join([*self._unfinished, lines[0]])
            self._unfinished, self._unfinished_bytes = [], 0
        self._unfinished_bytes += len(rest)
        if rest:
            self._unfinished.append(rest)
        if self._unfinished_bytes > self._line_bytes_max or (lines and len(lines[0]) > self._line_bytes_max):
            raise LineTooLong(f"a line is longer than the limit of {self._line_bytes_max} bytes")
        return lines

    @property
    def unfinished_bytes(self) -> int:
        """Bytes since the last newline."""
        return self._unfinished_bytes

    def finish(self) -> list[bytes]:
        """Returns the last line, if it had no newline at its end."""
        rest, self._unfinished, self._unfinished_bytes = b"".join(self._unfinished), [], 0
        return [rest] if rest else []


class RowSplitter:
    """Cuts chunks at the ends of CSV rows: newlines inside quoted fields stay (RFC 4180).

    A quote opens a field only where the field begins: a stray quote (`5" pipe`) is text, as readers of CSV take it.
    """

    def __init__(self, delimiter: bytes = b",") -> None:
        apart = re.escape(delimiter)
        # Possessive, so that a line is looked at once: [^"] and "" can never match the same bytes in two ways.
        quoted = rb'[^"]*+(?:""[^"]*+)*+'
        self._closes = re.compile(quoted + rb'"[^%b]*+(?:%b)?' % (apart, apart))
        self._opens = re.compile(rb'(?:(?:"%b"[^%b]*+|[^"%b][^%b]*+|)%b)*+"%b\Z' % (quoted, *[apart] * 4, quoted))
        self._lines = LineSplitter()
        self._row: list[bytes] = []  # lines of a row whose quoted field goes on
        self._row_bytes = 0

    def feed(self, chunk: bytes) -> list[bytes]:
        """Returns the rows that end in `chunk`, without the newline (LF or CR LF) at their ends. Raises LineTooLong."""
        return self._rows(self._lines.feed(chunk))

    def _rows(self, lines: list[bytes]) -> list[bytes]:
        rows = []
        for line in lines:
            inside = self._is_inside(line)
            if inside or self._row:
                self._row.append(line)
                self._row_bytes += len(line) + 1
                if self._row_bytes > LINE_BYTES_MAX:
                    raise LineTooLong(f"a row is longer than the limit of {LINE_BYTES_MAX} bytes")
            if not inside:
                rows.append((b"\n".join(self._row) if self._row else line).removesuffix(b"\r"))
                self._row, self._row_bytes = [], 0
        return rows

    def _is_inside(self, line: bytes) -> bool:
        """True if the line ends inside a quoted field."""
        at = 0
        if self._row:
            closed = self._closes.match(line)
            if closed is None:
                return True
            at = closed.end()
        return b'"' in line and self._opens.match(line, at) is not None

    @property
    def unfinished_bytes(self) -> int:
        """Bytes since the last row's end."""
        return self._row_bytes + self._lines.unfinished_bytes

    def finish(self) -> list[bytes]:
        """Returns the last row, if it had no newline at its end. Raises UnfinishedRow."""
        rows = self._rows(self._lines.finish())
        if self._row:
            raise UnfinishedRow("the input ends inside a quoted field, which has no closing quote")
        return rows


@dataclass(slots=True, kw_only=True)
class InputRecords:
    """Records of the lines before the first bad line; `error` describes that line.

    A column is None if the input has no such field; a timestamp or partition that is None is left to the producer."""

    values: list[Any] = field(default_factory=list)
    keys: list[bytes | None] | None = None
    headers: list[list[tuple[str, bytes | None]]] | None = None
    timestamps_ms: list[int | None] | None = None
    partitions: list[int | None] | None = None
    error: str | None = None
    missing_keys: int = 0  # records that have no field to take the key from


Parse = Callable[[list[bytes]], InputRecords]


def without_keys(lines: list[bytes]) -> InputRecords:
    """Returns records without keys: each line is a value."""
    return InputRecords(values=lines)


def keyed_by_separator(separator: bytes) -> Parse:
    """Returns a parser: text before the first `separator` of a line is the key, text behind it the value."""

    def parse(lines: list[bytes]) -> InputRecords:
        keys: list[bytes | None] = []
        values: list[bytes] = []
        for line in lines:
            key, found, value = line.partition(separator)
            if not found:
                shown = separator.decode(errors="backslashreplace")
                return InputRecords(values=values, keys=keys, error=f"no key separator {shown!r}")
            keys.append(key)
            values.append(value)
        return InputRecords(values=values, keys=keys)

    return parse


def keyed_by_field(name: str) -> Parse:
    """Returns a parser: the whole line is the value; the key is the JSON field `name`, or reached by a path with dots.

    A text becomes UTF-8, a number or boolean stays as written, null or an absent field is a null key."""

    def key_of(line: bytes) -> tuple[bytes | None, bool]:
        return _key_of(_load_numbers_as_text(line), name)

    return _keyed(key_of)


class KeyedByColumn:
    """Makes records of rows: the whole row is the value, the key is a column that the first row, which is no record,
    names. A row has as many fields as the first row: another number means a missing or surplus delimiter or quote."""

    def __init__(self, name: str | None, delimiter: str) -> None:
        self._name = name
        self._delimiter = delimiter
        self._at: int | None = None
        self._column_count = 0
        self._header_seen = False

    def __call__(self, rows: list[bytes]) -> InputRecords:
        """Returns the records of rows. Raises BadHeader."""
        if not self._header_seen and rows:
            try:
                columns = self._fields(rows[0].removeprefix(b"\xef\xbb\xbf"))
            except NoKey as error:
                raise BadHeader(f"row 1: {error}") from error
            if self._name is not None and self._name not in columns:
                raise BadHeader(f"row 1: no column {self._name!r}, only {', '.join(map(repr, columns)):.300}")
            self._at = None if self._name is None else columns.index(self._name)
            self._column_count = len(columns)
            self._header_seen = True
            rows = rows[1:]
        records = _keyed(self._key_of)(rows)
        if self._at is None:
            records.keys, records.missing_keys = None, 0
        return records

    def _key_of(self, row: bytes) -> tuple[bytes | None, bool]:
        # Bytes that are not UTF-8 matter to keys alone; in Latin-1 the delimiters are at the same positions as in
        # UTF-8.
        fields = self._fields(row, "latin-1" if self._at is None else "utf-8")
        if len(fields) != self._column_count:
            plural = "" if len(fields) == 1 else "s"
            raise NoKey(f"the row has {len(fields)} field{plural}, the header has {self._column_count}")
        return (None, True) if self._at is None else (fields[self._at].encode(), True)

    def _fields(self, row: bytes, encoding: str = "utf-8") -> list[str]:
        # The longest field that `csv` takes is set per process; a row was measured when it was cut.
        csv.field_size_limit(LINE_BYTES_MAX)
        try:
            # An empty row is a single empty field, as in a table with a single column.
            return next(csv.reader([row.decode(encoding)], delimiter=self._delimiter), None) or [""]
        except (csv.Error, UnicodeDecodeError) as error:
            raise NoKey(f"not CSV: {error}") from error


def _keyed(key_of: Callable[[bytes], tuple[bytes | None, bool]]) -> Parse:
    def parse(lines: list[bytes]) -> InputRecords:
        keys: list[bytes | None] = []
        missing = 0

        def until(error: str) -> InputRecords:
            return InputRecords(values=lines[: len(keys)], keys=keys, error=error, missing_keys=missing)

        for line in lines:
            try:
                key, found = key_of(line)
            except (ValueError, RecursionError) as error:
                return until(_reason(error, line))
            if key is not None and len(line) + len(key) > LINE_BYTES_MAX:
                sizes = f"it has {len(line)} bytes and its key {len(key)}"
                return until(f"{sizes}, together over the limit of {LINE_BYTES_MAX} bytes")
            keys.append(key)
            missing += not found
        return InputRecords(values=lines, keys=keys, missing_keys=missing)

    return parse


class _Number(str):
    """A JSON number as written: 1.50 and 12345678901234567890.0 are keys, not quantities."""

    __slots__ = ()


def _load_numbers_as_text(line: bytes) -> object:
    return json.loads(line, parse_int=_Number, parse_float=_Number, parse_constant=_Number)


def _key_of(document: object, name: str) -> tuple[bytes | None, bool]:
    """Returns the key, and True if the field is there. A field with dots in its own name comes before a path."""
    if not isinstance(document, dict):
        raise NoKey(f"not a JSON object, so there is no field {name!r}")
    found: object = document
    for part in [name] if name in document else name.split("."):
        if not isinstance(found, dict) or part not in found:
            return None, False
        found = found[part]
    if found is None:
        return None, True
    if isinstance(found, str):
        try:
            return found.encode(), True
        except UnicodeEncodeError as error:
            raise NoKey(f"field {name!r} is no text: {error.reason}") from error
    if isinstance(found, bool):
        return json.dumps(found).encode(), True
    raise NoKey(f"field {name!r} is {type(found).__name__}, but a key is text, a number, a boolean or null")


class NoKey(ValueError):
    """Well-formed, but nothing to take a key from."""


def _reason(error: Exception, line: bytes) -> str:
    if isinstance(error, NoKey):
        return str(error)
    return "empty, not JSON" if not line.strip() else f"not JSON: {error}"


# ---- records as `consume --json` writes them

_FIELDS = {
    "topic", "partition", "offset", "timestamp_ms", "key", "key_base64", "value", "value_base64", "headers"
}  # fmt: skip


def records_of_json(lines: list[bytes]) -> InputRecords:
    """Returns records of lines as `consume --json` writes them; `topic` and `offset`, the place where a record was
    read, are ignored."""
    from shproto.errors import StreamHouseError
    from streamhouse.core.record_checks import check_record

    records = InputRecords(values=[], keys=[], headers=[], timestamps_ms=[], partitions=[])
    for line in lines:
        try:
            value, key, headers, timestamp_ms, partition = _record_of(line)
            # A record that the producer would refuse is refused here, by its line and before later lines are sent.
            check_record(value, key, headers, timestamp_ms)
        except (ValueError, RecursionError, StreamHouseError) as error:
            refused = isinstance(error, BadRecord | StreamHouseError)
            records.error = str(error) if refused else _reason(error, line)
            return records
        records.values.append(value)
        for column, item in (
            (records.keys, key),
            (records.headers, headers),
            (records.timestamps_ms, timestamp_ms),
            (records.partitions, partition),
        ):
            assert isinstance(column, list)
            column.append(item)
    return records


def _record_of(line: bytes) -> tuple[Any, ...]:
    document = json.loads(line)
    if not isinstance(document, dict):
        raise BadRecord("not a JSON object")
    if unknown := document.keys() - _FIELDS:
        raise BadRecord(f"unknown field {min(unknown)!r}; there are {', '.join(sorted(_FIELDS))}")
    if "value" not in document and "value_base64" not in document:
        raise BadRecord("no field 'value' or 'value_base64'; null is written as null")
    headers = document.get("headers", [])
    if not isinstance(headers, list):
        raise BadRecord("field 'headers' is not a list")
    return (
        _bytes_of(document, "value"),
        _bytes_of(document, "key"),
        [_header_of(item) for item in headers],
        _integer_of(document, "timestamp_ms"),
        _partition_of(document),
    )


def _header_of(item: object) -> tuple[str, bytes | None]:
    if not isinstance(item, dict) or not isinstance(item.get("key"), str):
        raise BadRecord("field 'headers' has an entry that is not an object with a text 'key'")
    return item["key"], _bytes_of(item, "value")


def _bytes_of(document: dict[str, Any], name: str) -> bytes | None:
    if f"{name}_base64" in document:
        if name in document:
            raise BadRecord(f"fields {name!r} and '{name}_base64' exclude each other")
        try:
            return base64.b64decode(document[f"{name}_base64"], validate=True)
        except (TypeError, ValueError, binascii.Error):
            raise BadRecord(f"field '{name}_base64' is not base64") from None
    text = document.get(name)
    if text is None:
        return None
    if not isinstance(text, str):
        raise BadRecord(f"field {name!r} is neither text nor null; bytes come as '{name}_base64'")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(f"field {name!r} is no text: {error.reason}") from error


def _partition_of(document: dict[str, Any]) -> int | None:
    from shformat.limits import UINT32_MAX

    number = _integer_of(document, "partition")
    if number is not None and not 0 <= number <= UINT32_MAX:
        raise BadRecord(f"field 'partition' is {number}, must be 0 to {UINT32_MAX}")
    return number


def _integer_of(document: dict[str, Any], name: str) -> int | None:
    number = document.get(name)
    if number is not None and type(number) is not int:
        raise BadRecord(f"field {name!r} is not an integer")
    return number


class BadRecord(ValueError):
    """Well-formed JSON, but not a record."""
