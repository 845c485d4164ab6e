"""What a PostgreSQL server may answer instead of doing what it was asked, played into its wire protocol (version 3).

Owns: where one message ends, and which transaction the client believes to be in. Does not own: the bytes' way
(proxy.py), which error comes when (nemeses/servers.py).
Invariants: a statement that is answered with an error never reaches the server, and neither do those that follow it in
its transaction, which ends by a rollback, as the server itself would have it.
"""

import random
import struct
from collections import Counter
from dataclasses import dataclass, field

from tests.faults.proxy import Refused

SSL_REQUEST, GSS_REQUEST, CANCEL_REQUEST = 80877103, 80877104, 80877102
_LENGTH = struct.Struct("!i")
_BATCH_BEGINS = b"QPBEDCF"
IDLE, IN_TRANSACTION, FAILED = b"I", b"T", b"E"

ERRORS = {
    "53100": "could not extend file: No space left on device",
    "53200": "out of memory",
    "53300": "sorry, too many clients already",
    "55P03": "canceling statement due to lock timeout",
    "57014": "canceling statement due to statement timeout",
    "58030": "could not read block 0 in file: Input/output error",
    "XX000": "unexpected chunk number 0",
}
"""SQLSTATE -> what PostgreSQL says with it. 53300 is for who connects, the others are for statements."""

AT_CONNECT = "53300"
_ROLLBACK = b"Q" + _LENGTH.pack(4 + len(b"ROLLBACK") + 1) + b"ROLLBACK\0"
_IN_FAILED = ("25P02", "current transaction is aborted, commands ignored until end of transaction block")


@dataclass
class PostgresErrors:
    """The errors of one server: `share` of the statements (or connections) get `sqlstate` while it is not empty.
    `touched` counts them by SQLSTATE."""

    sqlstate: str = ""
    share: float = 1.0
    rng: random.Random = field(default_factory=random.Random)
    touched: Counter[str] = field(default_factory=Counter)

    def begin(self, sqlstate: str, *, share: float = 1.0, seed: int = 0) -> None:
        assert sqlstate in ERRORS, sqlstate
        self.sqlstate, self.share, self.rng = sqlstate, share, random.Random(seed)

    def heal(self) -> None:
        self.sqlstate = ""

    def next(self, *, connecting: bool) -> str:
        """The SQLSTATE of what comes now; empty: none."""
        if not self.sqlstate or connecting is not (self.sqlstate == AT_CONNECT) or self.rng.random() >= self.share:
            return ""
        self.touched[self.sqlstate] += 1
        return self.sqlstate


class PostgresSession:
    """One connection. `up` and `down` see all bytes of their way, in any pieces."""

    def __init__(self, errors: PostgresErrors) -> None:
        self._errors = errors
        self._up = b""
        self._down = b""
        self._is_starting = True
        self._ssl_answers = 0
        self._is_opaque = False
        self._is_ready = False
        self._status = IDLE
        self._has_failed = False
        self._is_skipping = False
        self._in_batch = False

    def up(self, data: bytes) -> tuple[bytes, bytes]:
        """Returns (what goes on to the server, what the client is answered). Raises Refused."""
        if self._is_opaque:
            return data, b""
        self._up += data
        onward, answer = [], []
        while self._is_starting and (message := self._take_first()):
            onward.append(message)
        while not self._is_starting and (message := self._take()):
            forward, reply = self._meet(message)
            onward.append(forward)
            answer.append(reply)
        return b"".join(onward), b"".join(answer)

    def down(self, data: bytes) -> None:
        """Follows the state of the transaction."""
        if self._is_opaque:
            return
        self._down += data
        while self._ssl_answers and self._down:
            # After its answer to SSLRequest a server that agrees speaks TLS: nothing to see any more.
            self._is_opaque = self._down[:1] != b"N"
            self._ssl_answers -= 1
            self._down = self._down[1:]
        while not self._is_opaque and len(self._down) >= 5:
            size_bytes = 1 + _LENGTH.unpack_from(self._down, 1)[0]
            if len(self._down) < size_bytes:
                return
            if self._down[:1] == b"Z":
                self._is_ready, self._status = True, self._down[5:6]
                self._has_failed = self._has_failed and self._status != IDLE
            self._down = self._down[size_bytes:]

    def _take_first(self) -> bytes:
        """A message without a type, as connections begin with; empty: not all of it is there."""
        if len(self._up) < 8:
            return b""
        size_bytes, code = struct.unpack_from("!ii", self._up)
        if len(self._up) < size_bytes:
            return b""
        message, self._up = self._up[:size_bytes], self._up[size_bytes:]
        if code in (SSL_REQUEST, GSS_REQUEST):
            self._ssl_answers += 1
        else:
            self._is_starting = False
            self._is_opaque = code == CANCEL_REQUEST
            if code != CANCEL_REQUEST and (sqlstate := self._errors.next(connecting=True)):
                raise Refused(error_response("FATAL", sqlstate, ERRORS[sqlstate]))
        return message

    def _take(self) -> bytes:
        if len(self._up) < 5:
            return b""
        size_bytes = 1 + _LENGTH.unpack_from(self._up, 1)[0]
        if len(self._up) < size_bytes:
            return b""
        message, self._up = self._up[:size_bytes], self._up[size_bytes:]
        return message

    def _meet(self, message: bytes) -> tuple[bytes, bytes]:
        kind = message[:1]
        if self._is_skipping:  # behind an error, up to the end of its batch
            if kind == b"S":
                self._is_skipping = False
                return b"", self._ready()
            return b"", b""
        if self._has_failed and _is_simple(message, b"COMMIT"):
            return _ROLLBACK, b""
        if self._is_ready and not self._in_batch and kind in _BATCH_BEGINS and (error := self._error_of(message)):
            self._has_failed = self._status != IDLE
            self._is_skipping = kind != b"Q"
            return b"", error_response("ERROR", *error) + (self._ready() if kind == b"Q" else b"")
        self._in_batch = kind not in b"QS" and (self._in_batch or kind in _BATCH_BEGINS)
        return message, b""

    def _error_of(self, message: bytes) -> tuple[str, str] | None:
        if _is_simple(message, b"COMMIT") or _is_simple(message, b"ROLLBACK"):
            return None
        if self._has_failed:
            return _IN_FAILED
        sqlstate = self._errors.next(connecting=False)
        return (sqlstate, ERRORS[sqlstate]) if sqlstate else None

    def _ready(self) -> bytes:
        return b"Z" + _LENGTH.pack(5) + (FAILED if self._status != IDLE else IDLE)


def _is_simple(message: bytes, command: bytes) -> bool:
    return message[:1] == b"Q" and message[5:].lstrip().upper().startswith(command)


def error_response(severity: str, sqlstate: str, message: str) -> bytes:
    fields = (("S", severity), ("V", severity), ("C", sqlstate), ("M", message))
    body = b"".join(f"{name}{value}".encode() + b"\0" for name, value in fields) + b"\0"
    return b"E" + _LENGTH.pack(4 + len(body)) + body
