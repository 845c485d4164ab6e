"""Validation of produce requests: ack level, batch, producer, timestamps; plain records become a batch.

Owns: the threads that check large batches. Does not own: the log; no check changes state.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from shformat import (
    BatchHeader,
    Codec,
    FormatError,
    Records,
    ValueOutOfRange,
    check_new_timestamps,
    encode_batch,
    read_batch_header,
    validate_new_batch,
)
from shproto.acks import ACKS_DURABLE, ACKS_NAMES, ACKS_WAL
from shproto.errors import AcksTooWeak, BatchTooLarge, InvalidArgument, InvalidBatch, UnknownProducer
from shproto.limits import INLINE_BYTES_MAX
from shproto.v1 import ingest_pb2 as pb
from shproto.v1 import types_pb2
from shruntime.clock import Clock
from shruntime.fair_executor import FairExecutor, QueueFull

from streamhouse_ingest.log.logs import HeldLog, Logs
from streamhouse_ingest.log.producers import FIRST_EPOCH
from streamhouse_ingest.produce.refusals import overloaded
from streamhouse_ingest.settings import IngestSettings

T = TypeVar("T")

_QUEUE_RETRY_MS = 200  # the largest batch takes about as long to check


class RequestRules:
    """Checks requests against the settings, the clock and the metadata known to the agent."""

    def __init__(self, logs: Logs, clock: Clock, settings: IngestSettings) -> None:
        self._logs = logs
        self._clock = clock
        self._settings = settings
        self._work = FairExecutor(at_once_max=settings.checks_at_once_max, bytes_max=settings.checks_queue_bytes_max)

    def acks(self, request: pb.ProduceRequest | pb.FenceProducerRequest, held: HeldLog) -> int:
        """Returns the ack level at which the request is answered: as requested, else the minimum of the topic.

        Raises InvalidArgument for an unknown level, AcksTooWeak for a level below the minimum of the topic.
        """
        if request.acks and request.acks not in ACKS_NAMES:
            raise InvalidArgument(
                f"acks is {request.acks}, known are 0 to 3", field="acks", value=request.acks, limit=ACKS_DURABLE
            )
        least = held.log.min_acks or ACKS_WAL
        if request.acks == types_pb2.ACKS_UNSPECIFIED:
            return least
        if request.acks < least:
            asked, allowed = ACKS_NAMES[request.acks], ACKS_NAMES[least]
            raise AcksTooWeak(
                f"topic {request.topic} wants acks {allowed} at least, not {asked}", acks=asked, min_acks=allowed
            )
        return request.acks

    async def validate(self, batch: bytes, connection: str) -> BatchHeader:
        """Returns the header of a batch that may be appended; checks large batches in a thread.

        Raises BatchTooLarge, InvalidBatch, InvalidArgument, Overloaded.
        """
        size_bytes, limit_bytes = len(batch), self._settings.batch_bytes_max
        if size_bytes > limit_bytes:
            raise BatchTooLarge(
                f"batch of {size_bytes} bytes, batch_bytes_max is {limit_bytes}",
                size_bytes=size_bytes,
                limit_bytes=limit_bytes,
            )
        try:
            # By the decoded size: a small batch may unpack to 64 MiB, which takes 0.2 s to check.
            if read_batch_header(batch).decoded_bytes <= INLINE_BYTES_MAX:
                header = validate_new_batch(batch)
            else:
                header = await self._in_thread(connection, lambda: validate_new_batch(batch), size_bytes)
        except ValueOutOfRange as error:
            raise _out_of_range(error) from error
        except FormatError as error:
            raise InvalidBatch(f"not a record batch: {error}", at=error.at, what=error.what) from error
        # Inside an epoch a skipped offset means loss: consumers raise DataLoss there.
        if not header.contiguous:
            raise InvalidBatch("a produced batch has no gaps in its offsets", at=0, what="offset gaps")
        return header

    def check_producer(self, header: BatchHeader, *, sequenced: bool) -> None:
        """Refuses a producer id from before the metadata was restored, which may be assigned twice, a sequenced batch
        without a producer that fences, and any other batch with the epoch of one. Raises UnknownProducer,
        InvalidArgument."""
        if header.producer is not None:
            self.check_producer_id(header.producer.producer_id)
        epoch = None if header.producer is None else header.producer.producer_epoch
        if not sequenced and epoch is not None and epoch > FIRST_EPOCH:
            # Without a fence: its first fence would answer that it has written nothing, and all would be written again.
            raise InvalidArgument(
                f"producer_epoch is {epoch}, must be {FIRST_EPOCH} in field batch: a producer with an epoch from "
                f"{FIRST_EPOCH + 1} on fences, and sends sequenced_batch",
                field="producer_epoch",
                value=epoch,
                limit=FIRST_EPOCH,
            )
        if sequenced and (epoch is None or epoch <= FIRST_EPOCH):
            raise InvalidArgument(
                f"a sequenced_batch needs a producer id and an epoch of at least {FIRST_EPOCH + 1}, got epoch {epoch}",
                field="sequenced_batch",
                value=epoch,
                limit=FIRST_EPOCH + 1,
            )

    def check_producer_id(self, producer_id: int) -> None:
        """Refuses a producer id from before the metadata was restored. Raises UnknownProducer."""
        first = self._logs.producer_ids_from
        if producer_id < first:
            raise UnknownProducer(
                f"producer id {producer_id} is from before the metadata was restored; ids begin at {first} now. Take a "
                "new one; whether a batch that is sent again was written before is unknown",
                producer_id=producer_id,
                producer_ids_from=first,
            )

    def check_timestamp(self, header: BatchHeader) -> None:
        """Refuses a timestamp far in the future, which would keep its segment from expiring. Raises InvalidArgument."""
        limit_ms = self._clock.wall_ms() + self._settings.timestamp_ahead_ms_max
        if header.max_timestamp_ms > limit_ms:
            raise InvalidArgument(
                f"timestamp_ms is {header.max_timestamp_ms}, at most {limit_ms} is accepted now "
                f"(timestamp_ahead_ms_max is {self._settings.timestamp_ahead_ms_max})",
                field="timestamp_ms",
                value=header.max_timestamp_ms,
                limit=limit_ms,
            )

    async def encode(self, request: pb.ProduceRequest, connection: str) -> bytes:
        """Returns the plain records as a single encoded batch; encodes large requests in a thread.

        Raises InvalidArgument, InvalidBatch, Overloaded.
        """
        plain = request.records.records
        limit = self._settings.records_per_plain_request_max
        if not 1 <= len(plain) <= limit:
            raise InvalidArgument(
                f"{len(plain)} records in one request, must be 1 to {limit}",
                field="records",
                value=len(plain),
                limit=limit,
            )
        now_ms, size_bytes = self._clock.wall_ms(), request.ByteSize()

        def encoded() -> bytes:
            records = _columns(plain, now_ms)
            check_new_timestamps(records.timestamps_ms)
            return encode_batch(records, codec=Codec.LZ4)

        try:
            if size_bytes <= INLINE_BYTES_MAX:
                return encoded()
            return await self._in_thread(connection, encoded, size_bytes)
        except ValueOutOfRange as error:
            raise _out_of_range(error) from error
        except FormatError as error:
            raise InvalidBatch(f"these records make no batch: {error}", at=error.at, what=error.what) from error

    async def _in_thread(self, connection: str, work: Callable[[], T], size_bytes: int) -> T:
        try:
            return await self._work.run(connection, work, size_bytes)
        except QueueFull as full:
            limit_bytes = self._settings.checks_queue_bytes_max
            raise overloaded("checks_queue_bytes_max", limit_bytes, full.queued_bytes, _QUEUE_RETRY_MS) from full


def _out_of_range(error: ValueOutOfRange) -> InvalidArgument:
    limit = f"{error.least}..{error.most}"
    return InvalidArgument(error.what, field=error.field, value=error.value, limit=limit)


def _columns(plain: Sequence[types_pb2.Record], now_ms: int) -> Records:
    """Returns the messages as columns, by a comprehension per column; a timestamp of 0 becomes `now_ms`."""
    headers = None
    if any(record.headers for record in plain):
        headers = [[(h.key, h.value if h.HasField("value") else None) for h in record.headers] for record in plain]
    return Records.from_lists(
        [record.value if record.HasField("value") else None for record in plain],
        [record.key if record.HasField("key") else None for record in plain],
        [record.timestamp_ms or now_ms for record in plain],
        headers,
    )
