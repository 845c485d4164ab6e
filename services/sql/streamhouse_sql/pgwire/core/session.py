"""State of a session: settings, and where its transaction stands. Pure.

Invariants: a setting is known, and keeps its value, or the SET is refused; settings go back at ROLLBACK, those
of SET LOCAL at the end of the transaction. A failed transaction takes nothing but its end, or ROLLBACK TO a savepoint.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from streamhouse_sql.pgwire.core.errors import PgError

# Catalogue queries of clients depend on it. Not newer than common clients: psql warns of a server newer than itself.
SERVER_VERSION = "15.0"
SERVER_VERSION_NUM = 150000
DATABASE = "streamhouse"


def _one_of(*values: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        found = [known for known in values if known.lower() == value.lower()]
        if not found:
            raise ValueError(f"supported: {', '.join(values)}")
        return found[0]

    return check


def _utf8(value: str) -> str:
    if value.strip("'\"").lower().replace("-", "") not in ("utf8", "unicode"):
        raise ValueError("text is UTF8")
    return "UTF8"


def _utc(value: str) -> str:
    if value.lower().replace("etc/", "") not in ("utc", "gmt", "zulu", "0", "+00", "+00:00", "universal", "uct"):
        raise ValueError("timestamps are computed and shown in UTC; the client may show them in its own zone")
    return "UTC"


def _iso(value: str) -> str:
    if not value.lower().startswith("iso"):
        raise ValueError("dates are ISO")
    return "ISO, MDY"


def _has_public(value: str) -> str:
    if "public" not in re.split(r"[\s,\"]+", value):
        raise ValueError("topics are in the schema public")
    return value


def _text(value: str) -> str:
    return value


_UNITS_MS = {"us": 0.001, "ms": 1, "": 1, "s": 1000, "min": 60_000, "h": 3_600_000, "d": 86_400_000}


def _duration(value: str) -> str:
    _duration_ms(value)
    return value


def _duration_ms(value: str) -> int:
    """Returns ms. Raises ValueError."""
    found = re.fullmatch(r"(\d{1,10})\s*([a-z]*)", value.strip())
    if not found or found[2] not in _UNITS_MS:
        raise ValueError("a number of ms, or with one of the units us, ms, s, min, h, d")
    return int(int(found[1]) * _UNITS_MS[found[2]])


def _number(low: int, high: int) -> Callable[[str], str]:
    def check(value: str) -> str:
        if not re.fullmatch(r"-?\d{1,10}", value) or not low <= int(value) <= high:
            raise ValueError(f"a number from {low} to {high}")
        return value

    return check


@dataclass(frozen=True, slots=True)
class _Setting:
    default: str
    check: Callable[[str], str]


_SWITCH = _one_of("on", "off", "true", "false", "1", "0", "yes", "no")
# All settings. Those checked by `_text`, `_SWITCH` or a range have no effect that a client could see: floats are
# always exact, nothing is locked, and plans are DuckDB's own.
_SETTINGS = {
    "application_name": _Setting("", _text),
    "client_encoding": _Setting("UTF8", _utf8),
    "datestyle": _Setting("ISO, MDY", _iso),
    "timezone": _Setting("UTC", _utc),
    "intervalstyle": _Setting("postgres", _one_of("postgres")),
    "bytea_output": _Setting("hex", _one_of("hex")),
    "standard_conforming_strings": _Setting("on", _one_of("on")),
    "search_path": _Setting('"$user", public', _has_public),
    "statement_timeout": _Setting("0", _duration),
    "extra_float_digits": _Setting("1", _number(-15, 3)),
    "transaction_isolation": _Setting("read committed", _one_of("read committed", "read uncommitted")),
    "default_transaction_isolation": _Setting("read committed", _one_of("read committed", "read uncommitted")),
    "transaction_read_only": _Setting("on", _SWITCH),
    "default_transaction_read_only": _Setting("on", _SWITCH),
    "client_min_messages": _Setting("notice", _text),
    "lock_timeout": _Setting("0", _duration),
    "idle_in_transaction_session_timeout": _Setting("0", _duration),
    "row_security": _Setting("on", _SWITCH),
    "synchronize_seqscans": _Setting("on", _SWITCH),
    "jit": _Setting("off", _SWITCH),
}
# Cannot be set.
_CONSTANTS = {
    "server_version": SERVER_VERSION,
    "server_version_num": str(SERVER_VERSION_NUM),
    "server_encoding": "UTF8",
    "integer_datetimes": "on",
    "is_superuser": "off",
    "in_hot_standby": "off",
    "max_identifier_length": "255",
    "max_index_keys": "32",
    "block_size": "8192",
    "lc_collate": "C",
    "lc_ctype": "C",
    "ssl": "off",
}
# Names as ParameterStatus writes them; clients are told each change.
_REPORTED = {
    "application_name": "application_name",
    "client_encoding": "client_encoding",
    "datestyle": "DateStyle",
    "default_transaction_read_only": "default_transaction_read_only",
    "in_hot_standby": "in_hot_standby",
    "integer_datetimes": "integer_datetimes",
    "intervalstyle": "IntervalStyle",
    "is_superuser": "is_superuser",
    "server_encoding": "server_encoding",
    "server_version": "server_version",
    "standard_conforming_strings": "standard_conforming_strings",
    "timezone": "TimeZone",
}
# Of the startup message, and not a setting.
_NOT_SETTINGS = {"user", "database", "replication", "options"}
_OPTION = re.compile(r"(?:-c\s*|--)([\w.]+)=((?:[^\s\\]|\\.)*)\s*")


class Session:
    """A session of `user`. `status`: I outside of a transaction, T inside, E inside a failed one."""

    def __init__(self, parameters: Mapping[str, str]) -> None:
        """Takes the startup message's parameters. Raises PgError for a setting that is not known or cannot be kept."""
        self.user = parameters.get("user", "")
        self.status = "I"
        self.savepoints: list[str] = []
        self._values: dict[str, str] = {}
        self._local: dict[str, str] = {}
        self._before: dict[str, str] = {}
        if not self.user:
            raise PgError("28000", "no PostgreSQL user name specified in startup packet", is_fatal=True)
        database = parameters.get("database") or self.user
        if database != DATABASE:
            raise PgError(
                "3D000", f'database "{database}" does not exist', hint=f"There is one: {DATABASE}.", is_fatal=True
            )
        if parameters.get("replication", "false").lower() not in ("false", "off", "0", "no"):
            raise PgError("0A000", "replication is not supported", is_fatal=True)
        given = dict(_options(parameters.get("options", "")))
        given |= {name: value for name, value in parameters.items() if name not in _NOT_SETTINGS}
        for name, value in given.items():
            if name.startswith("_pq_."):
                continue
            # A driver sends the zone of its machine without being asked; ParameterStatus tells which zone is kept.
            if name.lower() == "timezone":
                continue
            self.set(name.lower(), value)

    def get(self, name: str) -> str:
        """Returns a setting's value. Raises PgError."""
        name = name.lower()
        if name in _CONSTANTS:
            return _CONSTANTS[name]
        if name == "session_authorization":
            return self.user
        if name not in _SETTINGS:
            raise PgError("42704", f'unrecognized configuration parameter "{name}"')
        return self._local.get(name) or self._values.get(name) or _SETTINGS[name].default

    def all(self) -> dict[str, str]:
        """Returns all settings by name."""
        return {name: self.get(name) for name in sorted((*_SETTINGS, *_CONSTANTS))}

    def set(self, name: str, value: str | None, *, is_local: bool = False) -> str | None:
        """Changes a setting, None to its default. Returns its name for ParameterStatus if clients are told, else None.
        Raises PgError."""
        if name in _CONSTANTS:
            raise PgError("55P02", f'parameter "{name}" cannot be changed')
        setting = _SETTINGS.get(name)
        if setting is None:
            raise PgError("42704", f'unrecognized configuration parameter "{name}"')
        if value is not None:
            try:
                value = setting.check(value)
            except ValueError as error:
                raise PgError("22023", f'invalid value for parameter "{name}": "{value}"', hint=str(error)) from None
        if not is_local:
            self._values[name] = setting.default if value is None else value
        elif self.status == "T":
            self._local[name] = setting.default if value is None else value
        return _REPORTED.get(name)

    def reset_all(self) -> list[str]:
        """Sets all settings to their defaults. Returns the names of those that clients are told."""
        changed = [name for name in self._values if name in _REPORTED]
        self._values = {}
        return [_REPORTED[name] for name in changed]

    def reported(self) -> dict[str, str]:
        """Returns the settings of which clients are told, as ParameterStatus names them."""
        return {shown: self.get(name) for name, shown in _REPORTED.items()}

    def timeout_ms(self, longest_ms: int) -> int:
        """Returns the time that a statement has: statement_timeout, or the service's limit if that is shorter."""
        return min(_duration_ms(self.get("statement_timeout")) or longest_ms, longest_ms)

    # ---- transactions

    def begin(self) -> bool:
        """Returns False, and does nothing, inside of a transaction."""
        if self.status != "I":
            return False
        self.status, self._before = "T", dict(self._values)
        return True

    def end(self, *, is_commit: bool) -> bool:
        """Ends the transaction. Returns True if it was committed, False if it was rolled back: a failed one always
        is."""
        is_committed = is_commit and self.status != "E"
        if self.status != "I" and not is_committed:
            self._values = self._before
        self.status, self._local, self.savepoints = "I", {}, []
        return is_committed

    def fail(self) -> None:
        """Notes that a statement failed."""
        if self.status == "T":
            self.status = "E"

    def savepoint(self, what: str, name: str) -> None:
        """Makes (SAVEPOINT), forgets (RELEASE) or goes back to (ROLLBACK) a savepoint. Raises PgError."""
        if self.status == "I":
            raise PgError("25P01", f"{what} can only be used in transaction blocks")
        if what == "SAVEPOINT":
            self.savepoints.append(name)
            return
        if name not in self.savepoints:
            raise PgError("3B001", f'savepoint "{name}" does not exist')
        at = len(self.savepoints) - 1 - self.savepoints[::-1].index(name)
        del self.savepoints[at if what == "RELEASE" else at + 1 :]
        if what == "ROLLBACK":
            self.status = "T"


def _options(text: str) -> list[tuple[str, str]]:
    """Returns the settings of `-c name=value` options. Raises PgError for other options."""
    found, at = [], 0
    text = text.strip()
    while at < len(text):
        option = _OPTION.match(text, at)
        if option is None:
            raise PgError("22023", f"invalid command-line argument for server process: {text[at:]}", is_fatal=True)
        found.append((option[1].lower(), re.sub(r"\\(.)", r"\1", option[2])))
        at = option.end()
    return found
