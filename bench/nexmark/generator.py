"""Events of Nexmark, in columns: persons, auctions and bids as 1 : 3 : 46, from a seed.

After the description of the benchmark's authors and the parameters that Apache Beam and Flink run it with. An event's
number says its kind, its id and its time; the rest is random: three quarters of the bids are of a bidder that is
"hot" for a while, half of them for a hot auction, three quarters of the auctions of a hot seller. Each block has random
numbers of its own, so that a block is the same however many are made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

SHARES = {"person": 1, "auction": 3, "bid": 46}  # of each EPOCH events
KINDS = tuple(SHARES)
PERSONS, AUCTIONS = SHARES["person"], SHARES["auction"]
EPOCH = sum(SHARES.values())
BLOCK_EVENTS = 1_000 * EPOCH
START_MS = 1_767_225_600_000  # 2026-01-01, in UTC
FIRST_ID = 1_000  # of persons and of auctions
FIRST_CATEGORY, CATEGORIES = 10, 5
# A hot seller, bidder or auction is one of so many that came last, and chosen by all but one of so many events.
HOT_AMONG = 100
HOT_SELLERS, HOT_BIDDERS, HOT_AUCTIONS, HOT_CHANNELS = 4, 4, 2, 2
ACTIVE_PERSONS, OPEN_AUCTIONS = 1_000, 100
# Events name persons and auctions that come a little later, too.
LEAD = 10
CHANNELS = 10_000
SIDE_INPUT_ROWS = 10_000
_POOL_BYTES = 1 << 20
_STATES = ("AZ", "CA", "ID", "OR", "WA", "WY")
_CITIES = (
    "Phoenix", "Los Angeles", "San Francisco", "Boise", "Portland", "Bend", "Redmond", "Seattle", "Kent", "Cheyenne",
)  # fmt: skip
_FIRST_NAMES = ("Peter", "Paul", "Luke", "John", "Saul", "Vicky", "Kate", "Julie", "Sarah", "Deiter", "Walter")
_LAST_NAMES = ("Shultz", "Abrams", "Spencer", "White", "Bartels", "Walton", "Smith", "Jones", "Noris")
_POPULAR = ("Google", "Facebook", "Baidu", "Apple")
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Nexmark:
    """A stream of events. `rate`: events in a second of event time."""

    seed: int = 1
    rate: int = 100_000

    def blocks(self, kind: str, events: int) -> Iterator[pa.Table]:
        """Yields the rows of a kind among the first `events` events, in order of their time, at most those of
        BLOCK_EVENTS at a time. Raises ValueError unless `events` is a multiple of EPOCH."""
        if events % EPOCH or events < EPOCH:
            raise ValueError(f"{events} events: must be a multiple of {EPOCH}, and at least that")
        for first in range(0, events, BLOCK_EVENTS):
            numbers = np.arange(first, first + BLOCK_EVENTS, dtype=np.int64)
            place = numbers % EPOCH
            match kind:
                case "person":
                    rows = self._persons(numbers[place < PERSONS], self._rng(first, 0))
                case "auction":
                    rows = self._auctions(
                        numbers[(place >= PERSONS) & (place < PERSONS + AUCTIONS)], self._rng(first, 1)
                    )
                case "bid":
                    rows = self._bids(numbers[place >= PERSONS + AUCTIONS], self._rng(first, 2))
                case _:
                    raise ValueError(f"kind {kind!r}: must be one of {', '.join(KINDS)}")
            yield rows.slice(0, rows.num_rows * min(events - first, BLOCK_EVENTS) // BLOCK_EVENTS)

    def table(self, kind: str, events: int) -> pa.Table:
        """Returns the rows of a kind among the first `events` events."""
        return pa.concat_tables(self.blocks(kind, events)).combine_chunks()

    def _rng(self, first: int, kind: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, first, kind])

    # ---- kinds

    def _persons(self, numbers: Ints, rng: np.random.Generator) -> pa.Table:
        count = len(numbers)
        name = pc.binary_join_element_wise(_pick(rng, _FIRST_NAMES, count), _pick(rng, _LAST_NAMES, count), " ")
        email = pc.binary_join_element_wise(
            self._text(rng, _lengths(rng, 3, 7, count)), "@", self._text(rng, _lengths(rng, 3, 5, count)), ".com", ""
        )
        digits = [pa.array(rng.integers(1_000, 10_000, count)).cast(pa.string()) for _ in range(4)]
        card = pc.binary_join_element_wise(*digits, " ")
        return pa.table(
            {
                "id": _last_person(numbers) + FIRST_ID,
                "name": name,
                "emailAddress": email,
                "creditCard": card,
                "city": _pick(rng, _CITIES, count),
                "state": _pick(rng, _STATES, count),
                "dateTime": _time(self._time_ms(numbers)),
                "extra": self._text(rng, _lengths(rng, 110, 165, count)),  # 200 bytes of a person on average
            }
        )

    def _auctions(self, numbers: Ints, rng: np.random.Generator) -> pa.Table:
        count = len(numbers)
        person = _last_person(numbers)
        seller = np.where(
            rng.integers(0, HOT_SELLERS, count) > 0, person // HOT_AMONG * HOT_AMONG, _some_person(rng, person)
        )
        time_ms = self._time_ms(numbers)
        # On average an auction is open while OPEN_AUCTIONS others begin.
        open_ms = self._time_ms(numbers + OPEN_AUCTIONS * EPOCH // AUCTIONS) - time_ms
        initial = _prices(rng, count)
        return pa.table(
            {
                "id": _last_auction(numbers) + FIRST_ID,
                "itemName": self._text(rng, _lengths(rng, 3, 20, count)),
                "description": self._text(rng, _lengths(rng, 3, 100, count)),
                "initialBid": initial,
                "reserve": initial + _prices(rng, count),
                "dateTime": _time(time_ms),
                "expires": _time(time_ms + 1 + rng.integers(0, np.maximum(open_ms * 2, 1))),
                "seller": seller + FIRST_ID,
                "category": FIRST_CATEGORY + rng.integers(0, CATEGORIES, count),
                "extra": self._text(rng, _lengths(rng, 315, 472, count)),  # 500 bytes of an auction on average
            }
        )

    def _bids(self, numbers: Ints, rng: np.random.Generator) -> pa.Table:
        count = len(numbers)
        last = _last_auction(numbers)
        oldest = np.maximum(last - OPEN_AUCTIONS, 0)
        auction = np.where(
            rng.integers(0, HOT_AUCTIONS, count) > 0,
            last // HOT_AMONG * HOT_AMONG,
            rng.integers(oldest, last + 1 + LEAD),
        )
        person = _last_person(numbers)
        # The second of its hundred: hot bidders are no hot sellers.
        bidder = np.where(
            rng.integers(0, HOT_BIDDERS, count) > 0, person // HOT_AMONG * HOT_AMONG + 1, _some_person(rng, person)
        )
        channel = np.where(
            rng.integers(0, HOT_CHANNELS, count) > 0,
            rng.integers(0, len(_POPULAR), count),
            rng.integers(len(_POPULAR), len(_POPULAR) + CHANNELS, count),
        )
        channels, urls = self._channels
        return pa.table(
            {
                "auction": auction + FIRST_ID,
                "bidder": bidder + FIRST_ID,
                "price": _prices(rng, count),
                "channel": channels.take(pa.array(channel)),
                "url": urls.take(pa.array(channel)),
                "dateTime": _time(self._time_ms(numbers)),
                "extra": self._text(rng, _lengths(rng, 54, 82, count)),  # 100 bytes of a bid on average
            }
        )

    def _time_ms(self, numbers: Ints) -> Ints:
        times: Ints = START_MS + numbers * 1_000 // self.rate
        return times

    # ---- texts

    @cached_property
    def _pool(self) -> NDArray[np.uint8]:
        """Random letters, of which texts are cut."""
        return np.random.default_rng([self.seed, 1 << 40]).integers(97, 123, _POOL_BYTES).astype(np.uint8)

    def _text(self, rng: np.random.Generator, lengths: Ints) -> pa.Array:
        """Returns texts of these lengths."""
        ends = np.cumsum(lengths)
        starts = rng.integers(0, _POOL_BYTES - lengths)
        places = np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1])
        offsets = np.concatenate([[0], ends]).astype(np.int32)
        return pa.Array.from_buffers(
            pa.string(), len(lengths), [None, pa.py_buffer(offsets), pa.py_buffer(self._pool[places])]
        )

    @cached_property
    def _channels(self) -> tuple[pa.Array, pa.Array]:
        """Names of channels and their URLs, the popular ones first; nine of ten others have their number in the URL."""
        rng = np.random.default_rng([self.seed, 1 << 41])
        count = len(_POPULAR) + CHANNELS
        folders = [self._text(rng, _lengths(rng, 3, 5, count)) for _ in range(3)]
        base = pc.binary_join_element_wise("https://www.nexmark.com", *folders, "item.htm?query=1", "/")
        numbers = pa.array(np.arange(CHANNELS)).cast(pa.string())
        names = pa.concat_arrays([pa.array(_POPULAR), pc.binary_join_element_wise("channel-", numbers, "")])
        parameter = pc.binary_join_element_wise("&channel_id=", numbers, "")
        parameter = pc.if_else(pa.array(rng.integers(0, 10, CHANNELS) > 0), parameter, "")
        parameters = pa.concat_arrays([pa.array([""] * len(_POPULAR)), parameter])
        return names, pc.binary_join_element_wise(base, parameters, "")


def side_input() -> pa.Table:
    """Returns the small table that q13 joins bids with."""
    keys = np.arange(SIDE_INPUT_ROWS, dtype=np.int64)
    return pa.table({"key": keys, "value": pc.binary_join_element_wise("value-", pa.array(keys).cast(pa.string()), "")})


def json_values(rows: pa.Table) -> pa.Array:
    """Returns the JSON of each row, as bytes: numbers, texts without signs that JSON escapes, and times as
    `YYYY-MM-DD hh:mm:ss.mmm`, in UTC."""
    parts: list[pa.Array | str] = []
    for number, name in enumerate(rows.column_names):
        column = rows.column(name).combine_chunks()
        is_number = pa.types.is_integer(column.type)
        before = '"' if number and not pa.types.is_integer(rows.column(number - 1).type) else ""
        parts.append(f'{before}{"," if number else "{"}"{name}":{"" if is_number else chr(34)}')
        parts.append(column if pa.types.is_string(column.type) else column.cast(pa.string()))
    parts.append("}" if pa.types.is_integer(rows.schema.types[-1]) else '"}')
    return pc.binary_join_element_wise(*parts, "").cast(pa.binary())


def _last_person(numbers: Ints) -> Ints:
    """Returns the newest person as of each event, from 0."""
    return numbers // EPOCH


def _last_auction(numbers: Ints) -> Ints:
    """Returns the newest auction as of each event, from 0. No event before the first is a bid."""
    last: Ints = numbers // EPOCH * AUCTIONS + np.minimum(numbers % EPOCH - PERSONS, AUCTIONS - 1)
    return last


def _some_person(rng: np.random.Generator, last: Ints) -> Ints:
    """Returns one of the persons that came last."""
    return rng.integers(np.maximum(last + 1 - ACTIVE_PERSONS, 0), last + 1 + LEAD)


def _prices(rng: np.random.Generator, count: int) -> Ints:
    """Returns prices from 100 to 100,000,000: each power of ten as often as another."""
    return np.rint(np.power(10.0, rng.random(count) * 6.0) * 100.0).astype(np.int64)


def _lengths(rng: np.random.Generator, least: int, most: int, count: int) -> Ints:
    return rng.integers(least, most, count)


def _pick(rng: np.random.Generator, values: Sequence[str], count: int) -> pa.Array:
    return pa.array(values).take(pa.array(rng.integers(0, len(values), count)))


def _time(time_ms: Ints) -> pa.Array:
    return pa.array(time_ms, pa.timestamp("ms"))
