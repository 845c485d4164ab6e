"""From an exception to the one line that a user can act on."""

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
    """One line about an expected failure; None for a defect. `context` may name the bootstrap address in use."""
    from shproto.errors import StreamHouseError

    if isinstance(error, StreamHouseError):
        return _explain_refusal(error, context)
    # Only now: the store brings an S3 client with it, and what it takes to load that a refusal need not wait for.
    from shformat import FormatError
    from shruntime.settings import SettingsError
    from shstore.errors import StoreError

    if isinstance(error, OSError) and error.strerror:
        return one_line(_explain_os_error(error))
    if isinstance(error, SettingsError | StoreError | FormatError | OSError):
        return one_line(str(error))
    return None


def _explain_os_error(error: OSError) -> str:
    """Returns the reason of the operating system and the names it concerns, without the number of the error."""
    where = " to ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    return f"{where}: {error.strerror}" if where else str(error.strerror)


def one_line(text: str) -> str:
    """Returns the lines of `text` as one, without characters that a terminal would obey."""
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
