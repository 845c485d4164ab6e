"""The `streamhouse` command. Command modules import click and the standard library at the top, and everything
else inside their commands: `streamhouse --help` has to answer at once."""

from __future__ import annotations

import sys

from shruntime import signals

from streamhouse_cli.process import SERVICES


def main(prog_name: str | None = None) -> None:
    """Runs the command that the arguments of this process name, and ends the process with its exit code."""
    # Before all else: the imports of a command take a second, in which a reload must not end a service.
    signals.handle_from_the_start(survives_hangups=not SERVICES.isdisjoint(sys.argv[1:2]))
    from streamhouse_cli.app import cli

    cli(prog_name=prog_name)


__all__ = ["main"]
