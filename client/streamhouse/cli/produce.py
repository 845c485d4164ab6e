"""streamhouse produce: lines from a file or stdin become records."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from streamhouse.cli.failures import CliError, explain
from streamhouse.cli.lines import (
    Keying,
    LineSplitter,
    LineTooLong,
    keyed_by_field,
    keyed_by_separator,
    without_keys,
)
from streamhouse.cli.options import bootstrap_option
from streamhouse.cli.output import print_json
from streamhouse.cli.process import StopSignals, is_terminal, run_until_told
from streamhouse.cli.read_input import is_regular, open_input, read_chunks

if TYPE_CHECKING:
    import asyncio

    from streamhouse import Producer
    from streamhouse.delivery import SendResult

# Containers are killed 10 s after they were told to end; a leader that answers takes far less.
DRAIN_TIMEOUT_MS = 5_000


@click.command(short_help="Turn lines into records.")
@click.argument("topic")
@click.option(
    "--file", "path", type=click.Path(exists=True, dir_okay=False, allow_dash=True), default="-", help="Default: stdin."
)
@click.option("--key-field", metavar="NAME", help="Lines are JSON objects; the key is this field.")
@click.option("--key-separator", metavar="S", help="The key is what stands before the first S of a line.")
@click.option(
    "--acks",
    type=click.Choice(["none", "wal", "durable"]),
    default="wal",
    show_default=True,
    help="When a record counts as written: at once, in the leader's log, or on the object store.",
)
@click.option(
    "--drain-timeout-ms",
    type=click.IntRange(min=0),
    default=DRAIN_TIMEOUT_MS,
    show_default=True,
    help="After Ctrl-C or SIGTERM: how long to wait until what was read is acknowledged.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON on stdout.")
@bootstrap_option
def produce(
    topic: str,
    path: str,
    key_field: str | None,
    key_separator: str | None,
    acks: str,
    drain_timeout_ms: int,
    as_json: bool,
    bootstrap: str,
) -> None:
    """Write each line of a file or of stdin to TOPIC as one record.

    The line without its newline is the value, byte for byte; an empty line is an empty value. A line that has no key
    where one was asked for is an error that names it: the lines before it are written, nothing after it is.
    Ctrl-C and SIGTERM end the reading: the lines read are written and counted; a second Ctrl-C does not wait for that.
    Progress and summary go to stderr.
    """
    import asyncio

    if as_json and sys.stdout is None:
        raise CliError("stdout is closed")
    if key_field and key_separator:
        raise click.UsageError("--key-field and --key-separator exclude each other")
    if key_separator == "":
        raise click.UsageError("--key-separator must not be empty")
    keying: Keying = without_keys
    if key_field:
        keying = keyed_by_field(key_field)
    elif key_separator:
        keying = keyed_by_separator(os.fsencode(key_separator))
    with open_input(path) as descriptor, _progress(topic, descriptor) as progress:
        work = Work(topic, acks, descriptor, keying, progress)
        report = asyncio.run(_produce(bootstrap, work, drain_timeout_ms / 1000))
    report.show(as_json)
    if report.stopped_by:
        raise click.exceptions.Exit(128 + report.stopped_by)


@dataclass(frozen=True, slots=True)
class Work:
    """Input and destination of one `produce`."""

    topic: str
    acks: Any
    descriptor: int
    keying: Keying
    progress: Callable[[int], None]


@dataclass
class Report:
    """What has become of the input so far."""

    acks: str
    started_s: float = field(default_factory=time.monotonic)
    lines: int = 0
    size_bytes: int = 0
    acknowledged: int = 0
    failed: int = 0
    cut_off: bool = False  # the input was left in the middle of a line
    stopped_by: int = 0  # the signal's number

    @property
    def unacknowledged(self) -> int:
        """Number of lines that were sent, and neither acknowledged nor refused."""
        return self.lines - self.acknowledged - self.failed

    def show(self, as_json: bool) -> None:
        seconds = time.monotonic() - self.started_s
        rate = self.size_bytes / max(seconds, 1e-6)
        if as_json:
            values = {"records": self.acknowledged, "bytes": self.size_bytes, "seconds": round(seconds, 3)}
            print_json(values | {"bytes_per_second": round(rate), "unacknowledged": self.unacknowledged})
        what = "sent, not acknowledged" if self.acks == "none" else "acknowledged"
        text = f"{self.acknowledged:,} records {what}, {self.size_bytes / 1e6:,.1f} MB in {seconds:,.2f} s"
        text += f" ({rate / 1e6:,.1f} MB/s, {self.acknowledged / max(seconds, 1e-6):,.0f} records/s)"
        if self.stopped_by:
            name = "Ctrl-C" if self.stopped_by == signal.SIGINT else signal.Signals(self.stopped_by).name
            text = f"stopped by {name}: {text}"
        if self.unacknowledged:
            text += f"; {self.unacknowledged:,} more were sent, and may be written or not"
        if self.cut_off:
            text += "; the last line had no end yet and was not sent"
        click.echo(text, err=True)


class Sending:
    """Sends records and keeps account of which were acknowledged."""

    def __init__(self, producer: Producer, topic: str, report: Report) -> None:
        self._producer = producer
        self._topic = topic
        self._report = report
        self._pending: list[SendResult] = []
        self._error: Exception | None = None

    async def send(self, values: list[bytes], keys: list[bytes | None] | None) -> None:
        """Waits only while the producer's buffer is full. Raises DeliveryFailed once an earlier send has failed."""
        if values:
            self._report.lines += len(values)  # before it waits: cancelled, it has sent some of them
            self._pending.append(await self._producer.send_many(self._topic, values, keys=keys))
            self._report.size_bytes += sum(map(len, values))
        self._settle()

    async def finish(self) -> None:
        """Until every record is acknowledged. Raises DeliveryFailed when one was not."""
        try:
            await self._producer.flush()
        finally:
            self._settle()

    def _settle(self) -> None:
        done = [result for result in self._pending if result.done()]
        self._pending = [result for result in self._pending if not result.done()]
        faults = [fault for result in done for fault in result.errors()]
        failed = sum(len(positions) for _, positions in faults)
        self._report.failed += failed
        self._report.acknowledged += sum(map(len, done)) - failed
        self._error = self._error or (faults[0][0] if faults else None)
        if self._error is not None:
            raise DeliveryFailed(self._error)


class DeliveryFailed(Exception):
    """Records were not acknowledged; `error` is why, for the first of them."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


async def _produce(bootstrap: str, work: Work, drain_s: float) -> Report:
    import asyncio

    from streamhouse import Producer
    from streamhouse.cli.reach import reach_leaders

    await reach_leaders(bootstrap, work.topic)
    report = Report(work.acks)
    with StopSignals() as stop:
        async with Producer(bootstrap, acks=work.acks) as producer:
            sending = Sending(producer, work.topic, report)
            task = asyncio.create_task(_send_input(work, sending, report, stop.told))
            try:
                if not await run_until_told(task, stop, drain_s):
                    await producer.shut_down()
            except DeliveryFailed as failure:
                why = explain(failure.error, {"bootstrap": bootstrap}) or str(failure)
                raise CliError(
                    f"{why}; {report.failed:,} records failed, {report.acknowledged:,} were acknowledged"
                ) from failure
        report.stopped_by = stop.number
    return report


async def _send_input(work: Work, sending: Sending, report: Report, stop: asyncio.Event) -> None:
    splitter = LineSplitter()
    try:
        async for chunk in read_chunks(work.descriptor, stop):
            await _send_lines(sending, report, work.keying, splitter.feed(chunk))
            work.progress(len(chunk))
        if stop.is_set():
            report.cut_off = splitter.unfinished_bytes > 0
        else:
            await _send_lines(sending, report, work.keying, splitter.finish())
        await sending.finish()
    except LineTooLong as error:
        await sending.finish()
        raise CliError(f"line {report.lines + 1}: {error}{_so_far(report)}") from error
    except DeliveryFailed:
        await sending.finish()  # raises it again, once it is known of all of them
        raise


async def _send_lines(sending: Sending, report: Report, keying: Keying, lines: list[bytes]) -> None:
    keyed = keying(lines)
    await sending.send(keyed.values, keyed.keys)
    if keyed.error is not None:
        await sending.finish()
        raise CliError(f"line {report.lines + 1}: {keyed.error}{_so_far(report)}")


def _so_far(report: Report) -> str:
    what = "sent" if report.acks == "none" else "acknowledged"
    return f"; the {report.acknowledged:,} records before it were {what}, nothing after it was sent"


@contextmanager
def _progress(topic: str, descriptor: int) -> Iterator[Callable[[int], None]]:
    """A function that counts bytes; draws on stderr when that is a terminal and input is not typed by hand."""
    if not is_terminal(sys.stderr) or os.isatty(descriptor):
        yield lambda size_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()]
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        total = os.fstat(descriptor).st_size if is_regular(descriptor) else None
        task = bar.add_task(topic, total=total)
        yield lambda size_bytes: bar.update(task, advance=size_bytes)
