"""The `streamhouse` command. Command modules import only click and the standard library at the top, and what a
command needs inside it: `streamhouse --help` has to answer at once."""

from streamhouse.cli.app import cli as main

__all__ = ["main"]
