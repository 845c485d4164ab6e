"""streamhouse consume: records to stdout, as text or JSON lines."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING

import click

from streamhouse_cli.options import Delimiter, Number, bootstrap_option
from streamhouse_cli.output import Output
from streamhouse_cli.position import PositionOption, PositionType
from streamhouse_cli.process import run
from streamhouse_cli.text import record_json, text_lines

if TYPE_CHECKING:
    from streamhouse import Consumer, RecordBatch

# The reader of the pipe sets the pace (`| less` reads on when a key is pressed): only after a day a member counts as
# stuck, and its partitions go to other members.
PIPE_WAIT_MS_MAX = 86_400_000

Render = Callable[["RecordBatch"], bytes]


@click.command(short_help="Print records.")
@click.argument("topic")
@click.option(
    "--from",
    "position",
    type=PositionType(takes_last=True),
    metavar="POSITION",
    default="earliest",
    show_default=True,
    help="earliest, latest, an offset (42), the last records of each partition (-5), ms since 1970 "
    "(@1700000000000) or a time (2013-01-31T12:00:00Z, UTC unless it says otherwise).",
)
@click.option(
    "--to",
    "end",
    type=PositionType(takes_ends=False),
    metavar="POSITION",
    help="Stop before this offset or time, in each partition.",
)
@click.option("--partition", type=Number(min=0), help="Only this one. Default: all.")
@click.option("--group", help="Consumer group: share the partitions, go on where it stopped, commit.")
@click.option("--follow", is_flag=True, help="Go on at the end. Default: stop at the end as known at the start.")
@click.option("--max", "count_max", type=Number(min=1), metavar="N", help="Stop after N records.")
@click.option("--skip-lost", is_flag=True, help="Go on behind records that are damaged or declared lost.")
@click.option("--format", "shape", type=click.Choice(["text", "json", "raw"]), help="[default: text]")
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
@click.option(
    "--delimiter",
    type=Delimiter(or_empty=True),
    metavar="D",
    help="With raw: written behind each value, \\0 is a NUL byte; may be empty.  [default: \\n]",
)
@bootstrap_option
def consume(
    topic: str,
    position: PositionOption,
    end: PositionOption | None,
    partition: int | None,
    group: str | None,
    follow: bool,
    count_max: int | None,
    skip_lost: bool,
    shape: str | None,
    as_json: bool,
    delimiter: bytes | None,
    bootstrap: str,
) -> None:
    """Print the records of TOPIC.

    text: the value of each record on its own line; bytes that are not UTF-8 as \\xNN. raw: the bytes of each value
    as they are, and --delimiter behind each. json: one object per
    line with topic, partition, offset, timestamp_ms, key, value and headers; key or value that is not UTF-8 comes
    as key_base64, value_base64. With --group the committed offsets win over --from.
    """
    if group is not None and partition is not None:
        raise click.UsageError("--group shares out the partitions itself: leave out --partition")
    if as_json and shape not in (None, "json"):
        raise click.UsageError(f"--json and --format {shape} exclude each other")
    shape = "json" if as_json else shape or "text"
    if shape != "raw" and delimiter is not None:
        raise click.UsageError("--delimiter is for --format raw")
    renders: dict[str, Render] = {
        "text": _text,
        "json": _json_lines,
        "raw": partial(_raw, b"\n" if delimiter is None else delimiter),
    }
    reading = Reading(
        topic=topic,
        position=position,
        partition=partition,
        group=group,
        follow=follow,
        count_max=count_max,
        skip_lost=skip_lost,
        end=end,
    )
    # Ctrl-C and SIGTERM cancel the reading, so that a group member commits the printed records and leaves.
    run(lambda: _consume(bootstrap, reading, renders[shape]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Topic, range and group that a command reads."""

    topic: str
    position: PositionOption
    partition: int | None
    group: str | None
    follow: bool
    count_max: int | None
    skip_lost: bool
    end: PositionOption | None = None

    def consumer(self, bootstrap: str) -> Consumer:
        from streamhouse import Consumer

        whole = self.partition is None
        return Consumer(
            bootstrap,
            [self.topic] if whole else (),
            assign=() if self.partition is None else [(self.topic, self.partition)],
            group=self.group,
            start=self.position.start,
            end=None if self.end is None else self.end.exact,
            stop_at_end=not self.follow,
            on_data_loss="skip" if self.skip_lost else "error",
            max_poll_interval_ms=PIPE_WAIT_MS_MAX,
        )


async def _consume(bootstrap: str, reading: Reading, render: Render) -> None:
    from streamhouse_cli.reach import reach_readers

    output = Output(sys.stdout.fileno())
    left = reading.count_max
    # A topic that is unknown, or services that cannot be reached, are an error now, not a wait of the consumer.
    await reach_readers(bootstrap, reading.topic)
    async with reading.consumer(bootstrap) as consumer:
        async for batch in consumer.batches():
            wanted = len(batch) if left is None else min(left, len(batch))
            await output.write(render(batch.slice(0, wanted)))
            # A record that is not printed must not be committed: the group's position is put behind the last printed
            # record, now that it is printed.
            if wanted < len(batch) and (batch.topic, batch.partition) in consumer.assignment:
                await consumer.seek(batch.topic, batch.partition, int(batch.offsets[wanted - 1]) + 1)
            if left is not None:
                left -= wanted
                if left == 0:
                    return


def _text(batch: RecordBatch) -> bytes:
    return text_lines(batch.values.to_list(), terminal=sys.stdout.isatty())


def _raw(delimiter: bytes, batch: RecordBatch) -> bytes:
    """Returns the values as they are, a null as no bytes, each with the delimiter behind it."""
    return b"".join([part for value in batch.values.to_list() for part in (value or b"", delimiter)])


def _json_lines(batch: RecordBatch) -> bytes:
    headers = repeat(()) if batch.headers is None else batch.headers.to_list()
    columns = zip(
        batch.offsets.tolist(),
        batch.timestamps.tolist(),
        batch.keys.to_list(),
        batch.values.to_list(),
        headers,
        strict=False,  # `repeat` has no end
    )
    lines = []
    for offset, timestamp_ms, key, value, record_headers in columns:
        place = {"topic": batch.topic, "partition": batch.partition, "offset": offset, "timestamp_ms": timestamp_ms}
        lines.append(record_json(place, key, value, record_headers))
    return "".join(f"{line}\n" for line in lines).encode()
