"""streamhouse produce: lines from a file or stdin become records.

Owns: reading and cutting the input, the account of acknowledged lines. Does not own: batches, retries (the SDK's).
Invariants: lines are sent in their order, and none behind a bad line; a line counts as acknowledged only when its
partition's leader has said so. The first signal ends the reading, not the sending.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

import click

from streamhouse_cli.failures import CliError, explain
from streamhouse_cli.lines import (
    JSON_LINE_BYTES_MAX,
    BadHeader,
    BinaryInput,
    InputRecords,
    KeyedByColumn,
    LineSplitter,
    LineTooLong,
    MagicCheck,
    Parse,
    RowSplitter,
    UnfinishedRow,
    keyed_by_field,
    keyed_by_separator,
    records_of_json,
    without_keys,
)
from streamhouse_cli.options import Delimiter, Number, bootstrap_option
from streamhouse_cli.output import print_json
from streamhouse_cli.process import StopSignals, is_terminal, run, run_until_stopped
from streamhouse_cli.read_input import is_regular, open_input, read_chunks

if TYPE_CHECKING:
    import asyncio

    from streamhouse import Producer
    from streamhouse.delivery import SendResult

# Containers are killed 10 s after SIGTERM; a leader that answers takes far less.
DRAIN_TIMEOUT_MS = 5_000


@click.command(short_help="Turn lines into records.")
@click.argument("topic")
@click.option(
    "--file", "path", type=click.Path(exists=True, dir_okay=False, allow_dash=True), default="-", help="Default: stdin."
)
@click.option(
    "--format",
    "shape",
    type=click.Choice(["text", "json", "csv"]),
    default="text",
    show_default=True,
    help="text: a line is a value. json: records as `consume --json` writes them. csv: a row is a value.",
)
@click.option(
    "--key-field",
    metavar="NAME",
    help="The key is this field of the JSON object on each line, a.b one inside another; of csv, this column.",
)
@click.option(
    "--key-separator",
    type=Delimiter(),
    metavar="S",
    help="The key is what stands before the first S of a line; \\t is a tab.",
)
@click.option("--csv-header", is_flag=True, help="The first row names the columns and is no record.")
@click.option("--csv-delimiter", type=Delimiter(), default=",", show_default=True, metavar="C", help="\\t is a tab.")
@click.option(
    "--repartition", is_flag=True, help="With json: choose partitions by key, not those that the input names."
)
@click.option("--allow-binary", is_flag=True, help="Also take lines of what looks compressed, or like Parquet.")
@click.option(
    "--acks",
    type=click.Choice(["none", "wal", "durable"]),
    default="wal",
    show_default=True,
    help="When a record counts as written: at once, in the leader's log, or on the object store.",
)
@click.option(
    "--compression",
    type=click.Choice(["lz4", "zstd", "gzip", "none"]),
    default="lz4",
    show_default=True,
    help="Of batches on the wire, in logs and in segments.",
)
@click.option(
    "--drain-timeout-ms",
    type=Number(min=0),
    default=DRAIN_TIMEOUT_MS,
    show_default=True,
    help="After Ctrl-C, SIGTERM or SIGHUP: how long to wait until what was read is acknowledged.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON on stdout.")
@bootstrap_option
def produce(
    topic: str,
    path: str,
    shape: str,
    key_field: str | None,
    key_separator: bytes | None,
    csv_header: bool,
    csv_delimiter: bytes,
    repartition: bool,
    allow_binary: bool,
    acks: str,
    compression: str,
    drain_timeout_ms: int,
    as_json: bool,
    bootstrap: str,
) -> None:
    """Write each line of a file or of stdin to TOPIC as one record.

    The line without its newline is the value, byte for byte; an empty line is an empty value. With --format json a line
    is a whole record, so that `consume A --json | produce B --format json` copies a topic. A line that is no record, or
    has no key although keys are asked for, is an error with the line's number: lines before are written, lines after
    not. Ctrl-C, SIGTERM and a terminal that hangs up (SIGHUP) end the reading: the lines read are written and counted;
    a second Ctrl-C does not wait for that. Progress and summary go to stderr.
    """
    if as_json and sys.stdout is None:
        raise CliError("stdout is closed")
    form = Form(
        shape=shape,
        key_field=key_field,
        key_separator=key_separator,
        csv_header=csv_header,
        csv_delimiter=csv_delimiter,
        repartition=repartition,
        allow_binary=allow_binary,
    )
    form.check()
    with open_input(path) as descriptor, _progress(topic, descriptor) as progress:
        work = Work(
            topic=topic, acks=acks, compression=compression, descriptor=descriptor, form=form, progress=progress
        )
        report = run(lambda: _produce(bootstrap, work, drain_timeout_ms / 1000))
    try:
        report.show(as_json)
    except OSError:
        if report.stopped_by != signal.SIGHUP:  # else the reader of this went with the terminal
            raise
    if report.stopped_by:
        raise click.exceptions.Exit(128 + report.stopped_by)
    if report.missing_keys and report.missing_keys == report.lines:
        wrote = "the one record was" if report.lines == 1 else f"all {report.lines:,} were"
        raise CliError(f"no record has the field {key_field!r}: {wrote} written without a key")


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """Options that say how the input is read."""

    shape: str
    key_field: str | None
    key_separator: bytes | None
    csv_header: bool
    csv_delimiter: bytes
    repartition: bool
    allow_binary: bool

    def check(self) -> None:
        """Refuses options that exclude each other. Raises UsageError."""
        if self.key_field and self.key_separator:
            raise click.UsageError("--key-field and --key-separator exclude each other")
        if self.shape == "json" and (self.key_field or self.key_separator):
            raise click.UsageError("--format json has the keys in its records: leave out --key-field, --key-separator")
        if self.shape != "json" and self.repartition:
            raise click.UsageError("--repartition is for --format json: only its records name partitions")
        if self.shape != "csv" and (self.csv_header or self.csv_delimiter != b","):
            raise click.UsageError("--csv-header and --csv-delimiter are for --format csv")
        if self.shape == "csv":
            if self.key_separator:
                raise click.UsageError("--key-separator is for --format text; rows have --key-field with --csv-header")
            if self.key_field and not self.csv_header:
                raise click.UsageError("--key-field names a column: that takes --csv-header")
            if len(self.csv_delimiter) != 1 or self.csv_delimiter in b'"\r\n' or self.csv_delimiter > b"\x7f":
                raise click.UsageError("--csv-delimiter is one ASCII character, and neither a quote nor a newline")

    def splitter(self) -> LineSplitter | RowSplitter:
        """Returns a splitter of the input into lines or rows."""
        if self.shape == "csv":
            return RowSplitter(self.csv_delimiter)
        return LineSplitter(JSON_LINE_BYTES_MAX) if self.shape == "json" else LineSplitter()

    def parse(self) -> Parse:
        """Returns a parser that makes records of lines or rows."""
        if self.shape == "json":
            return records_of_json
        if self.csv_header:
            return KeyedByColumn(self.key_field, self.csv_delimiter.decode())
        if self.key_field:
            return keyed_by_field(self.key_field)
        return keyed_by_separator(self.key_separator) if self.key_separator else without_keys

    def place(self, lines: int) -> str:
        """Returns the name of the line or row behind `lines` records."""
        return f"row {lines + 1 + self.csv_header}" if self.shape == "csv" else f"line {lines + 1}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Input and destination of one `produce`."""

    topic: str
    acks: Any
    compression: Any
    descriptor: int
    form: Form
    progress: Callable[[int], None]


@dataclass(kw_only=True)
class ProduceReport:
    """Counts of the input so far: read, acknowledged, failed."""

    acks: str
    started_s: float = field(default_factory=time.monotonic)
    lines: int = 0
    size_bytes: int = 0
    acknowledged: int = 0
    failed: int = 0
    missing_keys: int = 0  # records without the field with the key
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
            values |= {"bytes_per_second": round(rate), "unacknowledged": self.unacknowledged}
            print_json(values | {"missing_keys": self.missing_keys})
        what = "sent, not acknowledged" if self.acks == "none" else "acknowledged"
        text = f"{_records(self.acknowledged)} {what}, {self.size_bytes / 1e6:,.1f} MB in {seconds:,.2f} s"
        text += f" ({rate / 1e6:,.1f} MB/s, {self.acknowledged / max(seconds, 1e-6):,.0f} records/s)"
        if self.stopped_by:
            name = "Ctrl-C" if self.stopped_by == signal.SIGINT else signal.Signals(self.stopped_by).name
            text = f"stopped by {name}: {text}"
        if self.unacknowledged:
            text += f"; {self.unacknowledged:,} more were sent, and may be written or not"
        if self.missing_keys:
            text += f"; {self.missing_keys:,} have no such field, and so no key"
        if self.cut_off:
            text += "; the last line had no end yet and was not sent"
        click.echo(text, err=True)


class Sending:
    """Sends records, and counts acknowledged and failed records in the report."""

    def __init__(self, producer: Producer, topic: str, report: ProduceReport) -> None:
        self._producer = producer
        self._topic = topic
        self._report = report
        self._pending: list[SendResult] = []
        self._error: Exception | None = None

    async def send(self, records: InputRecords) -> None:
        """Sends the records; waits only while the producer's buffer is full. Raises DeliveryFailed once an earlier send
        has failed."""
        self._report.lines += len(records.values)  # now: a cancelled send has sent some of them
        self._report.missing_keys += records.missing_keys
        self._report.size_bytes += sum(len(value) for value in records.values if value is not None)
        if records.partitions is None:
            if records.values:
                self._pending.append(await self._producer.send_many(self._topic, records.values, keys=records.keys))
        else:
            for partition, positions in _by_partition(records.partitions):
                self._pending.append(await self._send_some(records, partition, positions))
        self._settle()

    async def _send_some(self, records: InputRecords, partition: int | None, positions: list[int]) -> SendResult:
        now_ms = time.time_ns() // 1_000_000
        keys, headers, timestamps_ms = records.keys, records.headers, records.timestamps_ms
        assert keys is not None and headers is not None and timestamps_ms is not None
        times = [timestamps_ms[at] for at in positions]
        return await self._producer.send_many(
            self._topic,
            [records.values[at] for at in positions],
            keys=[keys[at] for at in positions],
            timestamps_ms=[now_ms if timestamp_ms is None else timestamp_ms for timestamp_ms in times],
            headers=[headers[at] for at in positions],
            partition=partition,
        )

    async def finish(self) -> None:
        """Waits until every record is acknowledged. Raises DeliveryFailed if a record was refused."""
        try:
            await self._producer.flush()
        finally:
            self._settle()

    def _settle(self) -> None:
        done = [result for result in self._pending if result.done()]
        # Sends that are done are dropped at each step: the input may be endless.
        self._pending = [result for result in self._pending if not result.done()]
        faults = [fault for result in done for fault in result.errors()]
        failed = sum(len(positions) for _, positions in faults)
        self._report.failed += failed
        self._report.acknowledged += sum(map(len, done)) - failed
        self._error = self._error or (faults[0][0] if faults else None)
        if self._error is not None:
            raise DeliveryFailed(self._error)


def _by_partition(partitions: list[int | None]) -> Iterator[tuple[int | None, list[int]]]:
    """Yields partitions with the positions of their records. A record without a partition may go to any partition, so
    all records before are yielded before: no partition gets records in another order."""
    for _, stretch in groupby(enumerate(partitions), lambda item: item[1] is None):
        positions: dict[int | None, list[int]] = {}
        for at, partition in stretch:
            positions.setdefault(partition, []).append(at)
        yield from positions.items()


class DeliveryFailed(Exception):
    """Records were not acknowledged; `error` is the reason for the first of these."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


async def _produce(bootstrap: str, work: Work, drain_s: float) -> ProduceReport:
    import asyncio

    from streamhouse import Producer

    from streamhouse_cli.reach import reach_leaders

    partition_count = await reach_leaders(bootstrap, work.topic)
    report = ProduceReport(acks=work.acks)
    with StopSignals() as stop:
        async with Producer(bootstrap, acks=work.acks, compression=work.compression) as producer:
            sending = Sending(producer, work.topic, report)
            task = asyncio.create_task(_send_input(work, sending, report, stop.requested, partition_count))
            try:
                if not await run_until_stopped(task, stop, drain_s):
                    await producer.shut_down()
            except DeliveryFailed as failure:
                why = explain(failure.error, {"bootstrap": bootstrap}) or str(failure)
                raise CliError(
                    f"{why}; {_records(report.failed)} failed, "
                    f"{report.acknowledged:,} {_were(report.acknowledged)} acknowledged"
                ) from failure
        report.stopped_by = stop.number
    return report


async def _send_input(
    work: Work, sending: Sending, report: ProduceReport, stop: asyncio.Event, partition_count: int
) -> None:
    form, splitter, magic = work.form, work.form.splitter(), MagicCheck()
    lines = Lines(sending=sending, report=report, form=form, parse=form.parse(), partition_count=partition_count)
    try:
        async for chunk in read_chunks(work.descriptor, stop):
            await lines.send(splitter.feed(chunk if form.allow_binary else magic.feed(chunk)))
            work.progress(len(chunk))
        await lines.send(splitter.feed(magic.finish()))
        if stop.is_set():
            report.cut_off = splitter.unfinished_bytes > 0
        else:
            # Only at the true end: after a signal the last line may be half of one.
            await lines.send(splitter.finish())
        await sending.finish()
    except (BinaryInput, BadHeader) as error:
        raise CliError(f"{error}; nothing was sent") from error
    except (LineTooLong, UnfinishedRow) as error:
        await sending.finish()
        raise CliError(f"{form.place(report.lines)}: {error}{_so_far(report)}") from error
    except DeliveryFailed:
        await sending.finish()  # raises the error again, once the outcome of all records is known
        raise


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """Makes records of lines and sends these, up to the first line that is no record."""

    sending: Sending
    report: ProduceReport
    form: Form
    parse: Parse
    partition_count: int

    async def send(self, lines: list[bytes]) -> None:
        """Sends the records of lines. Raises CliError with the number of the first bad line, once all lines before are
        acknowledged, and DeliveryFailed."""
        records = self.parse(lines)
        if self.form.repartition and records.partitions is not None:
            records.partitions = [None] * len(records.partitions)
        _refuse_partitions(records, self.partition_count)
        await self.sending.send(records)
        if records.error is not None:
            await self.sending.finish()
            place = self.form.place(self.report.lines)
            raise CliError(f"{place}: {records.error}{_so_far(self.report)}")


def _refuse_partitions(records: InputRecords, partition_count: int) -> None:
    """Ends the records before the first with a partition that the topic does not have."""
    for at, partition in enumerate(records.partitions or ()):
        if partition is not None and partition >= partition_count:
            records.error = (
                f"partition {partition}, but the topic has partitions 0 to {partition_count - 1}; "
                "--repartition chooses by key"
            )
            for column in (records.values, records.keys, records.headers, records.timestamps_ms, records.partitions):
                if column is not None:
                    del column[at:]
            return


def _so_far(report: ProduceReport) -> str:
    what = "sent" if report.acks == "none" else "acknowledged"
    count = report.acknowledged
    return f"; the {_records(count)} before it {_were(count)} {what}, nothing after it was sent"


def _records(count: int) -> str:
    return f"{count:,} record{'' if count == 1 else 's'}"


def _were(count: int) -> str:
    return "was" if count == 1 else "were"


@contextmanager
def _progress(topic: str, descriptor: int) -> Iterator[Callable[[int], None]]:
    """Yields a function that counts bytes; draws on stderr if that is a terminal and the input is not typed by hand."""
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
