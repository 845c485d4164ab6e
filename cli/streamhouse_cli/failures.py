"""Exceptions as lines that a user can act on."""

import importlib.util
import sys
from collections.abc import Mapping
from typing import IO, Any

import click
from shruntime.text import escaped


class CliError(click.ClickException):
    """Printed as `error: …` on stderr; exit code 1."""

    exit_code = 1

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"error: {escaped(self.format_message())}", file=file, err=True)


def explain(error: Exception, context: Mapping[str, str]) -> str | None:
    """Returns a line about an expected failure; None for a defect. `context` may name the bootstrap address in use."""
    from shproto.errors import StreamHouseError

    if isinstance(error, StreamHouseError):
        return _explain_refusal(error, context)
    from shformat import FormatError, MissingExtra

    if isinstance(error, OSError) and error.strerror:
        return one_line(_explain_os_error(error))
    if isinstance(error, OSError | FormatError | MissingExtra) or _is_of_loaded(error):
        return one_line(str(error))
    if isinstance(error, ModuleNotFoundError) and is_installed_with_server(error.name or ""):
        return str(MissingExtra("this command", error.name or "", "server"))
    return None


def _is_of_loaded(error: Exception) -> bool:
    """True for a SettingsError or StoreError. Both are raised only by modules that are loaded already; importing these
    modules to compare would need the extra `server`, and take longer than most commands."""
    kinds = (("shruntime.settings", "SettingsError"), ("shstore.errors", "StoreError"))
    return any(name in sys.modules and isinstance(error, getattr(sys.modules[name], kind)) for name, kind in kinds)


def is_installed_with_server(module: str) -> bool:
    """True for a module of a package, or in a namespace, that is not installed: beyond the base dependencies commands
    import packages of `server`, and zstd and Arrow, whose absence is a MissingExtra already. A module that is missing
    in an installed package, as ours are, is a defect."""
    spec = importlib.util.find_spec(module.partition(".")[0])
    return spec is None or spec.origin is None


def _explain_os_error(error: OSError) -> str:
    """Returns the reason of the operating system and the files concerned, without the number of the error."""
    where = " to ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    return f"{where}: {error.strerror}" if where else str(error.strerror)


def one_line(text: str) -> str:
    """Returns `text` as a single line, without characters that a terminal would obey."""
    return escaped(" ".join(text.split()))


def _explain_refusal(error: Any, context: Mapping[str, str]) -> str:
    bootstrap = context.get("bootstrap", "").split(",")
    # Also an address that a service advertises may be out of reach: nothing is wrong with --bootstrap then.
    if is_unreachable(error) and error.details.get("address") in bootstrap:
        where, why = context["bootstrap"], one_line(error.message)
        return (
            f"nothing answers at {where}: start it with `streamhouse serve`, or name another with --bootstrap ({why})"
        )
    text = f"{one_line(error.message)} ({error.reason})"
    if error.retry_after_ms:
        text += f"; try again in {error.retry_after_ms} ms"
    elif error.retriable and not getattr(error, "permanent", False):
        text += "; trying again may help"
    return text


def is_unreachable(error: Any) -> bool:
    """True if there was no connection at all; False for a service's own Unavailable."""
    return error.reason == "UNAVAILABLE" and not error.maybe_done
