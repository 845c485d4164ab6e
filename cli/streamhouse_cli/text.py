"""Record bytes as text and as JSON. Pure."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Sequence
from typing import Any

# Characters that a terminal obeys instead of showing: C0 but tab and newline, DEL, C1.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_ESCAPES = {"t": b"\t", "n": b"\n", "r": b"\r", "0": b"\0", "\\": b"\\"}
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|.|\Z)", re.DOTALL)


def unescape(text: str) -> bytes:
    """Returns the bytes that \\t, \\n, \\r, \\0, \\\\ and \\xNN in `text` stand for, the rest as UTF-8 or, of arguments
    that are not, as given. Raises ValueError for another escape."""
    parts, at = [], 0
    for match in _ESCAPE.finditer(text):
        parts.append(os.fsencode(text[at : match.start()]))
        name, at = match[1], match.end()
        if name in _ESCAPES:
            parts.append(_ESCAPES[name])
        elif len(name) == 3:
            parts.append(bytes.fromhex(name[1:]))
        else:
            raise ValueError(f"{match[0]!r} is none of \\t, \\n, \\r, \\0, \\xNN; a backslash is \\\\")
    return b"".join([*parts, os.fsencode(text[at:])])


def text_lines(values: Sequence[bytes | None], *, terminal: bool) -> bytes:
    """Returns a line per value, empty for a null. UTF-8 is written unchanged; other bytes are escaped as
    \\xNN. For a `terminal` control characters are escaped too: records are untrusted input."""
    joined = b"\n".join([value or b"" for value in values]) + b"\n" if values else b""
    if not terminal and _is_utf8(joined):
        return joined
    text = joined.decode("utf-8", "backslashreplace")
    if terminal:
        text = _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
    return text.encode()


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def bytes_json(name: str, value: bytes | None) -> dict[str, Any]:
    """Returns {name: text}, {name: null}, or {name_base64: …} if the bytes are not UTF-8."""
    if value is None:
        return {name: None}
    try:
        return {name: value.decode()}
    except UnicodeDecodeError:
        return {f"{name}_base64": base64.b64encode(value).decode()}


def record_json(
    place: dict[str, Any], key: bytes | None, value: bytes | None, headers: Sequence[tuple[str, bytes | None]]
) -> str:
    """Returns a JSON line; `place` holds topic, partition, offset, timestamp_ms."""
    shown: list[dict[str, Any]] = [{"key": name} | bytes_json("value", content) for name, content in headers]
    record = place | bytes_json("key", key) | bytes_json("value", value) | {"headers": shown}
    return json.dumps(record, ensure_ascii=False, separators=(",", ":"))
