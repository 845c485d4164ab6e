"""Settings of every service: a default, a unit, a range and a reason each.

Sources, the later wins: defaults, the TOML file named by STREAMHOUSE_CONFIG (top-level keys for all services, a table
per service for its own), STREAMHOUSE_* variables, values given in code. An unknown name or a value out of its range is
a SettingsError that names it. `docs/settings.md` is generated from these classes.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from shruntime.memory import MIB, MemoryShare
from shruntime.urls import address, address_or_empty, addresses, advertised_or_empty

PREFIX = "STREAMHOUSE_"
CONFIG_VARIABLE = "STREAMHOUSE_CONFIG"


class SettingsError(ValueError):
    """Names the setting, its value and the allowed values."""


def one_line(text: str) -> str:
    """Returns a setting's text unless it has control characters, which names in logs and tables must not have.
    Raises ValueError."""
    if not text.isprintable():
        raise ValueError("must be printable text on one line")
    return text


# A service cannot run with less: most likely another unit was meant.
MEMORY_LIMIT_BYTES_MIN = 64 * MIB


def _memory_limit(size_bytes: int) -> int:
    """Checks a memory limit. Raises ValueError."""
    if 0 < size_bytes < MEMORY_LIMIT_BYTES_MIN:
        raise ValueError(f"must be 0, or at least {MEMORY_LIMIT_BYTES_MIN} (64 MiB): it is in bytes")
    return size_bytes


class CommonSettings(BaseSettings):
    """Settings that all services understand. Subclasses set `service` and add their own fields."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)
    service: ClassVar[str] = "common"
    known: ClassVar[dict[str, type["CommonSettings"]]] = {}

    # First, since defaults of other settings are shares of it.
    memory_limit_bytes: Annotated[int, AfterValidator(_memory_limit)] = Field(
        0,
        ge=0,
        description="bytes of memory that the service may use (`serve`: with its PostgreSQL), which some defaults are "
        "parts of: 67108864 (64 MiB) or more; 0: what the machine has or the control group (container) allows",
    )
    listen: Annotated[str, AfterValidator(address)] = Field(
        "127.0.0.1:0", description="host:port of the gRPC server; port 0 takes a free one"
    )
    advertise: Annotated[str, AfterValidator(advertised_or_empty)] = Field(
        "",
        description="host:port at which others reach this service; empty: the listen address, or if that is 0.0.0.0 or "
        "[::] the address from which this machine reaches the coordinators or the rest of the world",
    )
    bootstrap: Annotated[str, AfterValidator(addresses)] = Field(
        "127.0.0.1:7070", description="coordinators, host:port, separated by commas"
    )
    calls_in_flight_max: int = Field(
        20_000,
        ge=1,
        le=1_000_000,
        description="calls worked on at once, 15 KB each; beyond, callers get OVERLOADED and when to try again. "
        "Every member of a group has a long poll open",
    )
    streams_open_max: int = Field(
        20_000,
        ge=1,
        le=1_000_000,
        description="streams open at once, 25 KB each; beyond, callers get OVERLOADED and when to try again. A "
        "producer has one to each leader, a consumer one to a query service",
    )
    calls_per_connection_max: int = Field(
        5_000,
        ge=1,
        le=1_000_000,
        description="of calls_in_flight_max, those of one connection: a process with thousands of clients shares one",
    )
    streams_per_connection_max: int = Field(
        5_000, ge=1, le=1_000_000, description="of streams_open_max, those of one connection, likewise"
    )
    calls_pending_max: int = Field(
        100_000,
        ge=1,
        le=10_000_000,
        description="calls that have arrived and were not accepted yet, 15 KB each; the server accepts thousands a "
        "second. Beyond, gRPC refuses them itself, and cannot say when to try again",
    )
    rpc_timeout_ms: int = Field(
        10_000,
        ge=100,
        le=600_000,
        description="ms a call to another service may take; ten times a slow PostgreSQL commit",
    )
    connections_max: int = Field(
        10_000,
        ge=1,
        le=1_000_000,
        description="connections the gRPC server takes, further ones are closed at once; fewer where the limit of open "
        "files (ulimit -n) would not leave 256 for files",
    )
    connections_per_address_max: int = Field(
        5_000,
        ge=1,
        le=1_000_000,
        description="connections from one address, further ones are closed within a second; half of all at most, so "
        "that one machine cannot shut out the others",
    )
    receive_window_bytes: int = Field(
        default_factory=MemoryShare(part=512, least=256 * 1024, most=16 * MIB),
        ge=64 * 1024,
        le=16 * MIB,
        description="bytes of one stream, and of one connection, that a client may send before they are read: a "
        "round trip's worth of the link. At 16 MiB gRPC finds the window by itself, up to that",
    )
    connection_handshake_timeout_ms: int = Field(
        10_000,
        ge=100,
        le=600_000,
        description="ms until a connection must have begun to speak HTTP/2; one that is silent for longer is closed",
    )
    shutdown_timeout_ms: int = Field(
        30_000,
        ge=0,
        le=3_600_000,
        description="ms to seal, upload and register at shutdown; the log keeps what is left then",
    )
    log_level: str = Field("INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$", description="DEBUG, INFO, WARNING or ERROR")
    log_json: bool = Field(False, description="one JSON object per log line, for log collectors")
    log_file: Annotated[str, AfterValidator(one_line)] = Field(
        "",
        description="file that log lines are appended to; empty: stderr. SIGHUP has it opened anew, after a rotation",
    )
    otlp_endpoint: str = Field(
        "", description="OTLP/gRPC collector for traces and metrics, e.g. http://127.0.0.1:4317; empty: off"
    )
    otlp_flush_timeout_ms: int = Field(
        3_000,
        ge=0,
        description="how long a stop waits for the collector to take what is buffered; a dead one must not outlast the "
        "patience of who stops the process (10 s of `docker stop`)",
    )
    trace_sample_ratio: float = Field(
        0.01, ge=0, le=1, description="part of the traces that is kept; 1 in 100 keeps the cost unmeasurable"
    )
    prometheus_listen: Annotated[str, AfterValidator(address_or_empty)] = Field(
        "", description="host:port that serves /metrics; empty: off"
    )

    def must_not_exceed(self, name: str, most: str, why: str) -> None:
        """Compares two settings. Raises ValueError, which names both and their values."""
        value, limit = getattr(self, name), getattr(self, most)
        if value > limit:
            raise ValueError(f"{name} ({value}) must not be above {most} ({limit}): {why}")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        CommonSettings.known[cls.service] = cls

    @property
    def is_measured(self) -> bool:
        """True if metrics are exported anywhere."""
        return bool(self.otlp_endpoint or self.prometheus_listen)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)  # load() merges the sources itself: it has to see unknown names

    @classmethod
    def load(cls, environ: Mapping[str, str] | None = None, **overrides: Any) -> Self:
        """Returns settings from file, variables and `overrides`. Raises SettingsError."""
        environ = os.environ if environ is None else environ
        values = cls._from_file(environ.get(CONFIG_VARIABLE, "")) | cls._from_variables(environ) | overrides
        try:
            return cls(**values)
        except ValidationError as error:
            raise SettingsError(cls._explain(error)) from error

    @classmethod
    def _explain(cls, error: ValidationError) -> str:
        """Returns the fault of each setting. Values that `repr` leaves out are secrets: their checks decide which
        text is shown."""
        parts = []
        for item in error.errors():
            if item["type"] == "default_factory_not_called":
                continue  # a default derived from a wrong setting
            if not item["loc"]:  # several settings together: the input is all of them, secrets included
                parts.append(cls._with_variables(item["msg"].removeprefix("Value error, ")))
                continue
            name = ".".join(str(part) for part in item["loc"])
            field = cls.model_fields.get(name)
            value = f" = {item.get('input')!r}" if field is None or field.repr else ""
            parts.append(f"{name} ({PREFIX}{name.upper()}){value}: {item['msg'].removeprefix('Value error, ')}")
        return f"settings of {cls.service}: " + "; ".join(parts)

    @classmethod
    def _with_variables(cls, text: str) -> str:
        """Returns the text with the variables of the settings it names, in the order of their first mention."""
        names = dict.fromkeys(name for name in re.findall(r"[a-z0-9_]*_[a-z0-9_]*", text) if name in cls.model_fields)
        variables = ", ".join(PREFIX + name.upper() for name in names)
        return f"{text} ({variables})" if variables else text

    @classmethod
    def _from_variables(cls, environ: Mapping[str, str]) -> dict[str, Any]:
        given = {key.removeprefix(PREFIX).lower(): value for key, value in environ.items() if key.startswith(PREFIX)}
        given.pop("config", None)
        for name in given:
            _must_be_known(name, PREFIX + name.upper())
        return {name: value for name, value in given.items() if name in cls.model_fields}

    @classmethod
    def _from_file(cls, path: str) -> dict[str, Any]:
        if not path:
            return {}
        try:
            content = tomllib.loads(Path(path).read_text())
        except OSError as error:
            raise SettingsError(f"cannot read settings from {path}: {error.strerror}") from error
        except ValueError as error:  # no TOML, or not UTF-8
            raise SettingsError(f"{path}: {error}") from error
        tables = {name: value for name, value in content.items() if isinstance(value, dict)}
        for table in tables:
            if table not in CommonSettings.known:
                raise SettingsError(
                    f"{path}: unknown table [{table}]; known: {', '.join(sorted(CommonSettings.known))}"
                )
        shared = {name: value for name, value in content.items() if name not in tables}
        for name in shared:
            _must_be_known(name, f"{path}: {name}")
        values = {name: value for name, value in shared.items() if name in cls.model_fields}
        for kind in reversed(cls.mro()):  # [common], then [store] where the service uses the store, then its own
            if issubclass(kind, CommonSettings):
                own = tables.get(kind.service, {})
                if wrong := own.keys() - kind.model_fields.keys():
                    raise SettingsError(f"{path}: [{kind.service}] has no setting {min(wrong)}")
                values |= own
        return values


CommonSettings.known["common"] = CommonSettings


def _must_be_known(name: str, shown: str) -> None:
    names = {field for settings in CommonSettings.known.values() for field in settings.model_fields}
    # A misspelt name would leave the default in force without a word.
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        raise SettingsError(f"unknown setting {shown}" + (f"; did you mean {near[0]}?" if near else ""))
