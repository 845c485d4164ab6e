"""streamhouse produce: lines from a file or stdin become records."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
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
from streamhouse.cli.read_input import is_regular, open_input, read_chunks

if TYPE_CHECKING:
    from streamhouse import Producer
    from streamhouse.delivery import SendResult


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
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON on stdout.")
@bootstrap_option
def produce(
    topic: str,
    path: str,
    key_field: str | None,
    key_separator: str | None,
    acks: str,
    as_json: bool,
    bootstrap: str,
) -> None:
    """Write each line of a file or of stdin to TOPIC as one record.

    The line without its newline is the value, byte for byte; an empty line is an empty value. A line that has no key
    where one was asked for is an error that names it: the lines before it are written, nothing after it is.
    Progress and summary go to stderr.
    """
    import asyncio

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
        report = asyncio.run(_produce(bootstrap, topic, acks, descriptor, keying, progress))
    report.show(as_json)


@dataclass
class Report:
    """What has become of the input so far."""

    acks: str
    started_s: float = field(default_factory=time.monotonic)
    lines: int = 0
    size_bytes: int = 0
    acknowledged: int = 0

    def show(self, as_json: bool) -> None:
        seconds = time.monotonic() - self.started_s
        rate = self.size_bytes / max(seconds, 1e-6)
        if as_json:
            values = {"records": self.acknowledged, "bytes": self.size_bytes, "seconds": round(seconds, 3)}
            print_json(values | {"bytes_per_second": round(rate)})
        what = "sent, not acknowledged" if self.acks == "none" else "acknowledged"
        text = f"{self.acknowledged:,} records {what}, {self.size_bytes / 1e6:,.1f} MB in {seconds:,.2f} s"
        click.echo(
            f"{text} ({rate / 1e6:,.1f} MB/s, {self.acknowledged / max(seconds, 1e-6):,.0f} records/s)", err=True
        )


class Sending:
    """Sends records and keeps account of which were acknowledged."""

    def __init__(self, producer: Producer, topic: str, report: Report) -> None:
        self._producer = producer
        self._topic = topic
        self._report = report
        self._pending: list[SendResult] = []

    async def send(self, values: list[bytes], keys: list[bytes | None] | None) -> None:
        """Waits only while the producer's buffer is full. Raises DeliveryFailed once an earlier send has failed."""
        if values:
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
        self._report.acknowledged += sum(map(len, done)) - failed
        if faults:
            raise DeliveryFailed(faults[0][0], failed)


class DeliveryFailed(Exception):
    """`failed` records were not acknowledged; `error` is why, for the first of them."""

    def __init__(self, error: Exception, failed: int) -> None:
        super().__init__(str(error))
        self.error = error
        self.failed = failed


async def _produce(bootstrap: str, topic: str, acks: Any, descriptor: int, keying: Keying, progress: Any) -> Report:
    from streamhouse import Producer
    from streamhouse.cli.reach import reach_leaders

    await reach_leaders(bootstrap, topic)
    report = Report(acks)
    async with Producer(bootstrap, acks=acks) as producer:
        sending = Sending(producer, topic, report)
        splitter = LineSplitter()
        try:
            async for chunk in read_chunks(descriptor):
                await _send_lines(sending, report, keying, splitter.feed(chunk))
                progress(len(chunk))
            await _send_lines(sending, report, keying, splitter.finish())
            await sending.finish()
        except LineTooLong as error:
            await sending.finish()
            raise CliError(f"line {report.lines + 1}: {error}{_so_far(report)}") from error
        except DeliveryFailed as failure:
            why = explain(failure.error, {"bootstrap": bootstrap}) or str(failure)
            raise CliError(
                f"{why}; {failure.failed:,} records failed, {report.acknowledged:,} were acknowledged"
            ) from failure
    return report


async def _send_lines(sending: Sending, report: Report, keying: Keying, lines: list[bytes]) -> None:
    keyed = keying(lines)
    await sending.send(keyed.values, keyed.keys)
    report.lines += len(keyed.values)
    if keyed.error is not None:
        await sending.finish()
        raise CliError(f"line {report.lines + 1}: {keyed.error}{_so_far(report)}")


def _so_far(report: Report) -> str:
    what = "sent" if report.acks == "none" else "acknowledged"
    return f"; the {report.acknowledged:,} records before it were {what}, nothing after it was sent"


@contextmanager
def _progress(topic: str, descriptor: int) -> Iterator[Any]:
    """A function that counts bytes; draws on stderr when that is a terminal and input is not typed by hand."""
    if not sys.stderr.isatty() or os.isatty(descriptor):
        yield lambda size_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()]
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        total = os.fstat(descriptor).st_size if is_regular(descriptor) else None
        task = bar.add_task(topic, total=total)
        yield lambda size_bytes: bar.update(task, advance=size_bytes)
