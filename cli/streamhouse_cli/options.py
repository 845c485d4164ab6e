"""Options that several commands share."""

import os
import re
from collections.abc import Callable
from typing import Any, TypeVar

import click
from shruntime.text import unit_of

from streamhouse_cli.failures import CliError

Command = TypeVar("Command", bound=Callable[..., Any])
PORT_MAX = 65_535
# Long enough for a service that is being restarted, short enough for a user with no service running.
RETRY_TIMEOUT_MS = 10_000
CONFIG_FILE = click.Path(exists=True, dir_okay=False)


class Text(click.ParamType[str]):
    """Text; Python hands down bytes that are not UTF-8 as lone surrogates, which no message can carry."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Returns the text. Raises CliError unless it is UTF-8."""
        text = str(value)
        try:
            text.encode()
        except UnicodeEncodeError:
            shown = os.fsencode(text).decode(errors="backslashreplace")
            where = "" if param is None else f"{param.human_readable_name if _is_argument(param) else param.opts[-1]} "
            raise CliError(f"{where}'{shown}' is not UTF-8") from None
        return text


def _is_argument(param: click.Parameter) -> bool:
    return isinstance(param, click.Argument)


def texts_are_utf8(command: click.Command) -> None:
    """Has every argument and option of a command and its subcommands that is plain text be UTF-8."""
    for param in command.params:
        if param.type is click.STRING:
            param.type = Text()
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            texts_are_utf8(inner)


class Number(click.IntRange):
    """A whole number within limits. Errors name the unit at the end of the option's name."""

    name = "integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            number = int(value)
        except ValueError:
            name = "" if param is None else param.name or ""
            self.fail(f"{value!r:.100} is not a whole number{unit_of(name)}", param, ctx)
        return int(super().convert(number, param, ctx))


class HostPort(click.ParamType[str]):
    """HOST:PORT; `many` also takes several, separated by commas. An IPv6 host stands in brackets."""

    name = "host:port"

    def __init__(self, *, many: bool = False, port_min: int = 1) -> None:
        self._many = many
        self._port_min = port_min

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        value = Text().convert(value, param, ctx)
        for address in value.split(",") if self._many else [value]:
            match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\s:\[\]/]+):(\d{1,5})", address.strip())
            if match is None or not self._port_min <= int(match[2]) <= PORT_MAX:
                self.fail(f"{address!r} is not HOST:PORT, as in 127.0.0.1:7070", param, ctx)
        return value


class Delimiter(click.ParamType[bytes]):
    """Bytes that stand between two things; \\t, \\n, \\0 and \\xNN are written as in C."""

    name = "delimiter"

    def __init__(self, *, or_empty: bool = False) -> None:
        self._or_empty = or_empty

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        from streamhouse_cli.text import unescape

        if isinstance(value, bytes):
            return value
        try:
            delimiter = unescape(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if not delimiter and not self._or_empty:
            self.fail("must not be empty", param, ctx)
        return delimiter


def bootstrap_option(command: Command) -> Command:
    """Returns the command with --bootstrap, also kept for the hint when nothing answers there, and --retry-timeout-ms,
    kept for `retry_timeout_ms`."""
    patience = click.option(
        "--retry-timeout-ms",
        type=Number(min=1),
        default=RETRY_TIMEOUT_MS,
        show_default=True,
        expose_value=False,
        callback=_remember,
        help="How long to try again when no coordinator answers.",
    )
    return patience(_bootstrap(command))


def _bootstrap(command: Command) -> Command:
    return click.option(
        "--bootstrap",
        type=HostPort(many=True),
        metavar="HOST:PORT[,…]",
        default="127.0.0.1:7070",
        envvar="STREAMHOUSE_BOOTSTRAP",
        show_default=True,
        show_envvar=True,
        callback=_remember,
        help="Coordinators; one that answers is enough.",
    )(command)


def _remember(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    ctx.ensure_object(dict)[param.name] = value
    return value


def retry_timeout_ms() -> int:
    """Returns the --retry-timeout-ms of the running command."""
    context = click.get_current_context(silent=True)
    options = {} if context is None else context.ensure_object(dict)
    return int(options.get("retry_timeout_ms", RETRY_TIMEOUT_MS))


def advertise_option(command: Command) -> Command:
    """Returns the command with --advertise, for services."""
    return click.option(
        "--advertise",
        type=HostPort(),
        help="Address at which others reach it, if not the one it listens on  [env: STREAMHOUSE_ADVERTISE]",
    )(command)


def json_option(command: Command) -> Command:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")(command)
