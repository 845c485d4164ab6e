"""From a stream of bytes to lines, and from lines to keys and values. Pure: no files, no network."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

# A record of 16 MiB less 64 KiB fits a batch, and less 64 KiB again leaves room for what is not its value. A longer
# line is not text, or not meant as one record.
LINE_BYTES_MAX = 16 * 1024 * 1024 - 128 * 1024


class LineTooLong(ValueError):
    """A line is over LINE_BYTES_MAX."""


class LineSplitter:
    """Cuts chunks at newlines; what follows the last one is held back for the next chunk."""

    def __init__(self) -> None:
        self._unfinished: list[bytes] = []
        self._unfinished_bytes = 0

    def feed(self, chunk: bytes) -> list[bytes]:
        """The lines that end in `chunk`, without their newlines. Raises LineTooLong."""
        *lines, rest = chunk.split(b"\n")
        if lines:
            lines[0] = b"".join([*self._unfinished, lines[0]])
            self._unfinished, self._unfinished_bytes = [], 0
        self._unfinished_bytes += len(rest)
        if rest:
            self._unfinished.append(rest)
        if self._unfinished_bytes > LINE_BYTES_MAX or (lines and len(lines[0]) > LINE_BYTES_MAX):
            raise LineTooLong(f"a line is longer than the limit of {LINE_BYTES_MAX} bytes")
        return lines

    @property
    def unfinished_bytes(self) -> int:
        """Bytes since the last newline."""
        return self._unfinished_bytes

    def finish(self) -> list[bytes]:
        """The last line, if it had no newline at its end."""
        rest, self._unfinished, self._unfinished_bytes = b"".join(self._unfinished), [], 0
        return [rest] if rest else []


@dataclass(frozen=True, slots=True)
class KeyedLines:
    """Records of the lines up to the first bad one; `error` says what is wrong with that line, the next one.
    `keys` is None when no key was asked for."""

    values: list[bytes]
    keys: list[bytes | None] | None
    error: str | None = None


Keying = Callable[[list[bytes]], KeyedLines]


def without_keys(lines: list[bytes]) -> KeyedLines:
    """Each line is a value."""
    return KeyedLines(lines, None)


def keyed_by_separator(separator: bytes) -> Keying:
    """What stands before the first `separator` of a line is its key, what follows its value."""

    def keying(lines: list[bytes]) -> KeyedLines:
        keys: list[bytes | None] = []
        values: list[bytes] = []
        for line in lines:
            key, found, value = line.partition(separator)
            if not found:
                return KeyedLines(values, keys, f"no key separator {separator.decode(errors='backslashreplace')!r}")
            keys.append(key)
            values.append(value)
        return KeyedLines(values, keys)

    return keying


def keyed_by_field(field: str) -> Keying:
    """The whole line is the value; its key is the JSON field named: text as UTF-8, numbers and booleans as JSON
    writes them, null or an absent field as a null key."""

    def keying(lines: list[bytes]) -> KeyedLines:
        keys: list[bytes | None] = []
        for at, line in enumerate(lines):
            try:
                key = _key_of(json.loads(line), field)
            except (ValueError, RecursionError) as error:
                return KeyedLines(lines[:at], keys, _reason(error, line))
            if key is not None and len(line) + len(key) > LINE_BYTES_MAX:
                sizes = f"it has {len(line)} bytes and its key {len(key)}"
                return KeyedLines(lines[:at], keys, f"{sizes}, together over the limit of {LINE_BYTES_MAX} bytes")
            keys.append(key)
        return KeyedLines(lines, keys)

    return keying


def _key_of(document: object, field: str) -> bytes | None:
    if not isinstance(document, dict):
        raise TypeMismatch(f"not a JSON object, so there is no field {field!r}")
    key = document.get(field)
    if key is None:
        return None
    if isinstance(key, str):
        return key.encode()
    if isinstance(key, bool | int | float):
        return json.dumps(key).encode()
    raise TypeMismatch(f"field {field!r} is {type(key).__name__}, but a key is text, a number, a boolean or null")


class TypeMismatch(ValueError):
    """Well-formed JSON, but nothing to take a key from."""


def _reason(error: Exception, line: bytes) -> str:
    if isinstance(error, TypeMismatch):
        return str(error)
    return "empty, not JSON" if not line.strip() else f"not JSON: {error}"
