"""Messages of the PostgreSQL frontend/backend protocol 3.0: bytes to messages of a client, answers to bytes.

Pure. Lengths are checked before anything is kept: a message longer than the limit, or shorter than its own fields, is
a ProtocolViolation. Terms: a *frontend* message comes from the client, a *backend* message goes to it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

PROTOCOL_3 = 3 << 16
CANCEL_CODE, SSL_CODE, GSSENC_CODE = 80877102, 80877103, 80877104
# PostgreSQL's own limit of the first message, which comes before anything is known about the client.
STARTUP_BYTES_MAX = 10_000
_INT16, _INT32, _UINT16, _UINT32 = (struct.Struct(code) for code in ("!h", "!i", "!H", "!I"))


class ProtocolViolation(Exception):
    """The client's bytes are no message. The connection cannot go on: where the next message begins is unknown."""


@dataclass(frozen=True, slots=True)
class Startup:
    """The first message of a session: protocol version and parameters such as user and database."""

    version: int
    parameters: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class EncryptionRequest:
    """A request for TLS or GSSAPI encryption, before Startup."""


@dataclass(frozen=True, slots=True)
class CancelRequest:
    """A request to cancel the statement of another connection; it comes on a connection of its own."""

    process_id: int
    secret: bytes


@dataclass(frozen=True, slots=True)
class SimpleQuery:
    """Query: a text with any number of statements."""

    text: str


@dataclass(frozen=True, slots=True)
class Parse:
    """Parse: a statement under a name ("" is the unnamed one). `oids`: types of its parameters, 0 if unspecified."""

    statement: str
    text: str
    oids: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bind:
    """Bind: values for a statement's parameters make a portal. Formats: 0 is text, 1 is binary; none means text for
    all, and one is meant for all."""

    portal: str
    statement: str
    formats: Sequence[int]
    values: Sequence[bytes | None]
    result_formats: Sequence[int]


@dataclass(frozen=True, slots=True)
class Describe:
    """Describe: of a statement ("S") or portal ("P")."""

    kind: str
    name: str


@dataclass(frozen=True, slots=True)
class Execute:
    """Execute: a portal, for at most `rows_max` rows; 0: all."""

    portal: str
    rows_max: int


@dataclass(frozen=True, slots=True)
class Close:
    """Close: of a statement ("S") or portal ("P")."""

    kind: str
    name: str


@dataclass(frozen=True, slots=True)
class Sync:
    """Sync: the end of a series of extended-query messages."""


@dataclass(frozen=True, slots=True)
class Flush:
    """Flush: the client waits for the answers so far."""


@dataclass(frozen=True, slots=True)
class Terminate:
    """Terminate: the client leaves."""


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A message of a part of the protocol that is not spoken here: function calls, COPY, passwords."""

    name: str


First = Startup | EncryptionRequest | CancelRequest
Message = SimpleQuery | Parse | Bind | Describe | Execute | Close | Sync | Flush | Terminate | Unsupported


class Decoder:
    """Splits a client's bytes into messages. `message_bytes_max`: of one message; at most that and the last argument
    of `feed` is kept."""

    def __init__(self, message_bytes_max: int) -> None:
        self._message_bytes_max = message_bytes_max
        self._bytes = bytearray()

    def feed(self, data: bytes) -> None:
        """Adds bytes of the client."""
        self._bytes += data

    def first(self) -> First | None:
        """Returns a message from before the session, None while it is incomplete. Raises ProtocolViolation."""
        if len(self._bytes) < 4:
            return None
        (length,) = _UINT32.unpack_from(self._bytes)
        if not 8 <= length <= STARTUP_BYTES_MAX:
            raise ProtocolViolation(f"invalid length of startup packet: {length}")
        if len(self._bytes) < length:
            return None
        body = _Body(bytes(self._bytes[4:length]))
        del self._bytes[:length]
        return _first(body)

    def messages(self) -> Iterator[tuple[Message, int]]:
        """Yields the complete messages, with the size of each in bytes. Raises ProtocolViolation."""
        at = 0
        try:
            while len(self._bytes) - at >= 5:
                tag = chr(self._bytes[at])
                (length,) = _UINT32.unpack_from(self._bytes, at + 1)
                if tag not in _DECODERS:
                    raise ProtocolViolation(f"invalid frontend message type {self._bytes[at]}")
                if not 4 <= length <= self._message_bytes_max:
                    raise ProtocolViolation(
                        f"message {tag!r} has a length of {length}, which is not between 4 and "
                        f"sql_pg_message_bytes_max, {self._message_bytes_max}"
                    )
                if len(self._bytes) - at < 1 + length:
                    return
                body = _Body(bytes(self._bytes[at + 5 : at + 1 + length]))
                at += 1 + length
                message = _DECODERS[tag](body)
                body.end()
                yield message, 1 + length
        finally:
            del self._bytes[:at]


class _Body:
    """Fields of a message, read in their order. Raises ProtocolViolation where the message ends too early."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, size: int) -> bytes:
        if size < 0 or size > len(self._data) - self._at:
            raise ProtocolViolation("insufficient data left in message")
        self._at += size
        return self._data[self._at - size : self._at]

    def number(self, form: struct.Struct) -> int:
        return int(form.unpack(self.take(form.size))[0])

    def numbers(self, form: struct.Struct) -> list[int]:
        """Returns a counted list."""
        count = self.number(_UINT16)
        return list(struct.unpack(f"!{count}{form.format[1:]}", self.take(count * form.size)))

    def text(self) -> str:
        end = self._data.find(b"\0", self._at)
        if end < 0:
            raise ProtocolViolation("invalid string in message")
        data = self.take(end - self._at)
        self._at += 1
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise ProtocolViolation(f"invalid byte sequence for encoding UTF8 in message: {error.reason}") from error

    @property
    def is_at_end(self) -> bool:
        return self._at == len(self._data)

    def rest(self) -> bytes:
        return self.take(len(self._data) - self._at)

    def end(self) -> None:
        if not self.is_at_end:
            raise ProtocolViolation("invalid message format: bytes behind its last field")


def _first(body: _Body) -> First:
    code = body.number(_UINT32)
    if code in (SSL_CODE, GSSENC_CODE):
        body.end()
        return EncryptionRequest()
    if code == CANCEL_CODE:
        return CancelRequest(body.number(_UINT32), body.rest())
    if code >> 16 != 3:
        raise ProtocolViolation(f"unsupported frontend protocol {code >> 16}.{code & 0xFFFF}: server supports 3.0")
    parameters: dict[str, str] = {}
    while name := body.text():
        parameters[name] = body.text()
    body.end()
    return Startup(code, parameters)


def _bind(body: _Body) -> Bind:
    portal, statement, formats = body.text(), body.text(), body.numbers(_UINT16)
    values: list[bytes | None] = []
    for _ in range(body.number(_UINT16)):
        size = body.number(_INT32)
        values.append(None if size == -1 else body.take(size))
    return Bind(
        portal=portal,
        statement=statement,
        formats=formats,
        values=values,
        result_formats=body.numbers(_UINT16),
    )


def _named(body: _Body) -> tuple[str, str]:
    kind = body.take(1)
    if kind not in (b"S", b"P"):
        raise ProtocolViolation(f"invalid subtype {kind!r} of a message about a statement or portal")
    return kind.decode(), body.text()


def _unsupported(name: str) -> Callable[[_Body], Message]:
    def decode(body: _Body) -> Message:
        body.rest()
        return Unsupported(name)

    return decode


_DECODERS: Mapping[str, Callable[[_Body], Message]] = {
    "Q": lambda body: SimpleQuery(body.text()),
    "P": lambda body: Parse(body.text(), body.text(), body.numbers(_UINT32)),
    "B": _bind,
    "D": lambda body: Describe(*_named(body)),
    "E": lambda body: Execute(body.text(), body.number(_INT32)),
    "C": lambda body: Close(*_named(body)),
    "S": lambda body: Sync(),
    "H": lambda body: Flush(),
    "X": lambda body: Terminate(),
    "F": _unsupported("FunctionCall"),
    "d": _unsupported("CopyData"),
    "c": _unsupported("CopyDone"),
    "f": _unsupported("CopyFail"),
    "p": _unsupported("PasswordMessage"),
}


# ---- backend messages


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """A column of a result: name, type, and the format of its values (0 text, 1 binary)."""

    name: str
    oid: int
    size_bytes: int
    format: int = 0


def _message(tag: bytes, body: bytes = b"") -> bytes:
    return tag + _INT32.pack(len(body) + 4) + body


def _text(value: str) -> bytes:
    # A zero byte would end the text early, and the rest would be read as other fields.
    return value.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace") + b"\0"


REFUSE_ENCRYPTION = b"N"
AUTHENTICATION_OK = _message(b"R", _INT32.pack(0))
PARSE_COMPLETE, BIND_COMPLETE, CLOSE_COMPLETE = _message(b"1"), _message(b"2"), _message(b"3")
NO_DATA, EMPTY_QUERY, PORTAL_SUSPENDED = _message(b"n"), _message(b"I"), _message(b"s")


def negotiate_version(minor: int, unknown_options: Sequence[str]) -> bytes:
    """Returns NegotiateProtocolVersion: the newest minor version spoken here, and options that are not known."""
    return _message(
        b"v", _INT32.pack(minor) + _INT32.pack(len(unknown_options)) + b"".join(map(_text, unknown_options))
    )


def backend_key(process_id: int, secret: bytes) -> bytes:
    """Returns BackendKeyData, which a CancelRequest repeats."""
    return _message(b"K", _UINT32.pack(process_id) + secret)


def parameter_status(name: str, value: str) -> bytes:
    """Returns ParameterStatus: a setting that clients follow."""
    return _message(b"S", _text(name) + _text(value))


def ready_for_query(status: str) -> bytes:
    """Returns ReadyForQuery. `status`: I outside of a transaction, T inside, E inside a failed one."""
    return _message(b"Z", status.encode())


def command_complete(tag: str) -> bytes:
    """Returns CommandComplete, such as `SELECT 3`."""
    return _message(b"C", _text(tag))


def row_description(fields: Sequence[Field]) -> bytes:
    """Returns RowDescription."""
    columns = (
        _text(field.name) + struct.pack("!IhIhih", 0, 0, field.oid, field.size_bytes, -1, field.format)
        for field in fields
    )
    return _message(b"T", _INT16.pack(len(fields)) + b"".join(columns))


def parameter_description(oids: Sequence[int]) -> bytes:
    """Returns ParameterDescription."""
    return _message(b"t", _UINT16.pack(len(oids)) + b"".join(map(_UINT32.pack, oids)))


def error_response(
    *, severity: str, sqlstate: str, message: str, hint: str = "", detail: str = "", position: int = 0
) -> bytes:
    """Returns ErrorResponse. `position`: of the character in the statement's text, from 1; 0: unknown."""
    return _message(b"E", _report(severity, sqlstate, message, hint, detail, position))


def notice_response(*, severity: str, sqlstate: str, message: str) -> bytes:
    """Returns NoticeResponse."""
    return _message(b"N", _report(severity, sqlstate, message, "", "", 0))


def _report(severity: str, sqlstate: str, message: str, hint: str, detail: str, position: int) -> bytes:
    fields = {"S": severity, "V": severity, "C": sqlstate, "M": message, "D": detail, "H": hint}
    fields["P"] = str(position) if position else ""
    return b"".join(name.encode() + _text(value) for name, value in fields.items() if value) + b"\0"
