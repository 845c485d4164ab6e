"""streamhouse sql translate: the same statements for an engine that is made to scale out."""

from __future__ import annotations

import click

from streamhouse_cli.sql_running import statement_error
from streamhouse_cli.sql_sources import read_source
from streamhouse_cli.sql_statements import Statement

# Names of streamhouse_sql.core.translate.TARGETS, whose import would need the extra `sql` for --help.
TARGETS = ("flink", "risingwave", "spark")


@click.command(short_help="Write statements for Flink, RisingWave or Spark.")
@click.option("--to", "target", type=click.Choice(TARGETS), required=True, help="Engine to write for.")
@click.option(
    "--servers",
    default="",
    metavar="HOST:PORT",
    help="Addresses that the engine reads from. Default: localhost:9092, Kafka's protocol; spark: 127.0.0.1:7070.",
)
@click.argument("path", metavar="FILE", type=click.Path())
def translate(target: str, servers: str, path: str) -> None:
    """Write the statements of FILE for another engine; - is stdin.

    CREATE TABLE, CREATE MATERIALIZED VIEW, CREATE SINK, INSERT INTO ... SELECT and SELECT are translated, to stdout,
    each table before the statements that read it. A clause that the engine does not have is an error that names it, and
    ends the command with 1; a difference that its words cannot express is a comment in front of its statement. Nothing
    is run, and no service is asked.
    """
    name, source = read_source(path)
    from shformat import MissingExtra
    from shproto.errors import InvalidStatement

    try:
        from streamhouse_sql.core.translate import translate as translated
    except ModuleNotFoundError as error:
        raise MissingExtra("streamhouse sql translate", error.name or "", "sql") from error
    try:
        statements = translated(source, target, servers=servers)
    except InvalidStatement as error:
        raise statement_error(error, Statement(source, 0, source), name) from error
    click.echo("\n".join(str(statement) for statement in statements), nl=False)
