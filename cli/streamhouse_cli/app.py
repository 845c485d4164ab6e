"""The command group: the list of commands, and the line or exit code that an exception becomes."""

import errno
import sys
from typing import Any

import click
from streamhouse import __version__

from streamhouse_cli import (
    backup,
    consume,
    group,
    health,
    inspect_commands,
    partition,
    produce,
    restore,
    serve,
    services,
    sql,
    status,
    sweep,
    topic,
    verify,
)
from streamhouse_cli.failures import CliError, explain
from streamhouse_cli.options import texts_are_utf8
from streamhouse_cli.process import SERVICES, Termination, keep_standard_descriptors, reader_is_gone, silence_stdout

HELP = """StreamHouse: a durable log over object storage.

Start with `streamhouse serve`, then in another terminal:

\b
  streamhouse topic create orders --partitions 4
  echo hello | streamhouse produce orders
  streamhouse consume orders --from earliest
"""


# Commands that serve, or report on stderr and by their exit code.
WITHOUT_STDOUT = SERVICES | {"produce", "health"}

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class FriendlyGroup(click.Group):
    """Shows an expected error as a line on stderr (exit 1), ends on Ctrl-C (130) and SIGTERM (143), and ends quietly
    if the reader of its output has gone (0).

    A defect keeps its traceback, for the bug report.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        keep_standard_descriptors()
        try:
            return super().parse_args(ctx, args)
        except BrokenPipeError:  # of --help and --version
            raise _end_of_pipe() from None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if sys.stdout is None and name not in WITHOUT_STDOUT:  # before anything is done: the answer could not be seen
            raise CliError("stdout is closed")
        return name, command, rest

    def invoke(self, ctx: click.Context) -> Any:
        with Termination() as termination:
            try:
                return super().invoke(ctx)
            except KeyboardInterrupt:
                raise click.exceptions.Exit(termination.exit_code) from None
            except (click.ClickException, click.exceptions.Exit, click.Abort):
                raise
            except Exception as error:
                if isinstance(error, BrokenPipeError) and reader_is_gone():
                    raise _end_of_pipe() from None
                if _is_of_stdout(error, ctx.invoked_subcommand):
                    raise CliError(f"stdout: {error.strerror}") from error  # type: ignore[attr-defined]
                text = explain(error, ctx.obj)
                if text is None:
                    raise
                raise CliError(text) from error


def _is_of_stdout(error: Exception, command: str | None) -> bool:
    """True for a full disk under stdout: the only file without a name that commands, services excepted, write to."""
    no_space = isinstance(error, OSError) and error.errno in NO_SPACE and error.filename is None
    return no_space and command not in SERVICES


def _end_of_pipe() -> click.exceptions.Exit:
    silence_stdout()
    return click.exceptions.Exit(0)


@click.group(cls=FriendlyGroup, help=HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="streamhouse")
@click.pass_context
def cli(ctx: click.Context) -> None:
    ctx.obj = {}


for command in (
    serve.serve,
    topic.topic,
    produce.produce,
    consume.consume,
    sql.sql,
    status.status,
    group.group,
    partition.partition,
    verify.verify,
    sweep.sweep,
    backup.backup,
    restore.restore,
    inspect_commands.segment,
    inspect_commands.wal,
    health.health,
    services.ingest,
    services.segmenter,
    services.query,
    services.sql_worker,
    services.coordinator,
):
    cli.add_command(command)
texts_are_utf8(cli)
