"""The command group: which commands there are, and what becomes of an exception."""

from typing import Any

import click

from streamhouse import __version__
from streamhouse.cli import (
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
    status,
    sweep,
    topic,
    verify,
)
from streamhouse.cli.failures import EXIT_INTERRUPTED, CliError, explain, silence_stdout

HELP = """StreamHouse: a durable log over object storage.

Start with `streamhouse serve`, then in another terminal:

\b
  streamhouse topic create orders --partitions 4
  echo hello | streamhouse produce orders
  streamhouse consume orders --from earliest
"""


class FriendlyGroup(click.Group):
    """Shows what went wrong as one line on stderr (exit 1), is quiet on Ctrl-C (exit 130) and closed pipes (exit 0).

    A defect keeps its traceback: it is ours to see.
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise click.exceptions.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            silence_stdout()
            raise click.exceptions.Exit(0) from None
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            text = explain(error, ctx.obj)
            if text is None:
                raise
            raise CliError(text) from error


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
    services.coordinator,
):
    cli.add_command(command)
