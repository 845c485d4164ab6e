"""Nemeses of links do what they say to the links they name, to no other, and undo it."""

import asyncio
import random
from collections.abc import AsyncIterator
from itertools import count
from pathlib import Path

import pytest

from tests.faults.fleet import WAYS, Fleet
from tests.faults.history import Recorder
from tests.faults.nemeses import NEMESES, network
from tests.faults.nemesis import NotPossible
from tests.faults.proxy import BOTH, Direction, FaultProxy

pytestmark = pytest.mark.long

SHORT_S = 0.15
"""Long enough to be sure that nothing comes over loopback."""

PATIENCE_S = 20
HOLES = [f"black-hole-{source}-{target}" for source, target in network.BLACK_HOLES]
_numbers = count()


class Echo:
    """What all links lead to. Answers every line with itself."""

    def __init__(self) -> None:
        self.address = ""
        self.arrived: set[bytes] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                self.arrived.add(line)
                writer.write(line)
        except ConnectionError:
            pass
        finally:
            writer.close()


@pytest.fixture
async def echo() -> AsyncIterator[Echo]:
    service = Echo()
    server = await asyncio.start_server(service.serve, "127.0.0.1", 0)
    service.address = "{}:{}".format(*server.sockets[0].getsockname())
    yield service
    server.close()


@pytest.fixture
async def fleet(tmp_path: Path, echo: Echo) -> AsyncIterator[Fleet]:
    """No processes; every link there is, each with a connection that has been used."""
    recorder = Recorder(tmp_path / "history.jsonl")
    made = Fleet(tmp_path, recorder)
    made.library = tmp_path / "shim.so"
    for way in WAYS:
        made.links[way] = FaultProxy(way, echo.address)
        await made.links[way].start()
    yield made
    for link in made.links.values():
        await link.stop()
    recorder.close()


class Connection:
    """Through a link. `arrived`, `answered`: whether the line that `send` sent has."""

    def __init__(self, echo: Echo, streams: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
        self._echo = echo
        self._reader, self._writer = streams
        self._line = b""
        self._answer: asyncio.Task[bytes] | None = None

    @classmethod
    async def open(cls, echo: Echo, link: FaultProxy) -> "Connection":
        host, _, port = link.address.rpartition(":")
        made = cls(echo, await asyncio.open_connection(host, int(port)))
        made.send()
        await made.until_answered()
        return made

    def send(self) -> None:
        self._line = b"%d\n" % next(_numbers)
        self._writer.write(self._line)
        self._answer = asyncio.create_task(self._reader.readline())

    @property
    def arrived(self) -> bool:
        return self._line in self._echo.arrived

    @property
    def answered(self) -> bool:
        return self._answer is not None and self._answer.done() and self._answer.result() == self._line

    async def until_answered(self) -> None:
        assert self._answer is not None, "nothing was sent"
        async with asyncio.timeout(PATIENCE_S):
            assert await self._answer == self._line

    def close(self) -> None:
        if self._answer is not None:
            self._answer.cancel()
        self._writer.close()


@pytest.fixture
async def connections(fleet: Fleet, echo: Echo) -> AsyncIterator[dict[str, Connection]]:
    """One through each link."""
    made = {way: await Connection.open(echo, link) for way, link in fleet.links.items()}
    yield made
    for connection in made.values():
        connection.close()


def held(fleet: Fleet) -> dict[str, tuple[Direction, ...]]:
    ways = {way: tuple(side for side in BOTH if not link.is_open(side)) for way, link in fleet.links.items()}
    return {way: sides for way, sides in ways.items() if sides}


@pytest.mark.parametrize("name", HOLES)
async def test_a_black_hole_swallows_what_it_says_and_nothing_else(
    fleet: Fleet, echo: Echo, connections: dict[str, Connection], name: str
) -> None:
    rng = random.Random(name)
    seen = set()
    for _ in network.DIRECTIONS:
        async with NEMESES[name](fleet, rng) as deed:
            silent = held(fleet)
            assert silent and silent.keys() <= fleet.busy
            (sides,) = set(silent.values())
            seen.add(sides)
            assert all(way in deed.text for way in silent) and all(side.value in deed.text for side in sides)
            for connection in connections.values():
                connection.send()
            await asyncio.gather(*(connections[way].until_answered() for way in connections.keys() - silent.keys()))
            await asyncio.sleep(SHORT_S)
            for way in silent:
                assert (connections[way].arrived, connections[way].answered) == (Direction.UP not in sides, False), way
        await asyncio.gather(*(connections[way].until_answered() for way in silent))
        assert held(fleet) == {} and not fleet.busy
        assert all(f"bytes {side.value}" in deed.effect for side in sides)
    assert seen == {BOTH, (Direction.UP,), (Direction.DOWN,)}


@pytest.mark.smoke
@pytest.mark.parametrize(("source", "target"), network.BLACK_HOLES)
def test_a_black_hole_lies_between_what_its_name_says(source: str, target: str) -> None:
    found = {tuple(network.hole_links(random.Random(seed), source, target)) for seed in range(200)}
    assert len(found) > 1 or source == target
    for way in (way for ways in found for way in ways):
        assert way in WAYS
        one, _, other = way.partition(">")
        assert one in network.GROUPS[source] and other in network.GROUPS[target]
    together = {way for ways in found for way in ways}
    assert len(together) == len(network.GROUPS[source]) * len(network.GROUPS[target]), "some link is never hit"


async def test_a_service_cannot_be_told_from_a_client_without_the_shim(fleet: Fleet) -> None:
    fleet.library = None
    with pytest.raises(NotPossible):
        async with NEMESES["black-hole-segmenter-agent"](fleet, random.Random(1)):
            pass
    async with NEMESES["black-hole-client-agent"](fleet, random.Random(1)):
        assert held(fleet)


@pytest.mark.smoke
async def test_isolate_hits_all_links_from_or_to_one_process(fleet: Fleet) -> None:
    seen: set[str] = set()
    for seed in range(60):
        async with NEMESES["isolate"](fleet, random.Random(seed)) as deed:
            ways = held(fleet)
            name = deed.text.split()[1].rstrip(":")
            outgoing = {way for way in WAYS if way.startswith(f"{name}>")}
            incoming = {way for way in WAYS if way.endswith(f">{name}")}
            assert ways.keys() in (outgoing, incoming, outgoing | incoming)
            assert set(ways.values()) == {BOTH}
            seen |= ways.keys()
        assert held(fleet) == {}
    assert len(seen) > len(WAYS) / 2


async def test_flaky_resets_the_connections_of_one_link_again_and_again(fleet: Fleet, echo: Echo) -> None:
    async with NEMESES["flaky"](fleet, random.Random(3)) as deed:
        link = fleet.links[deed.text.split()[0]]
        for _ in range(3):
            connection = await Connection.open(echo, link)
            assert connection._answer is not None
            async with asyncio.timeout(PATIENCE_S):
                with pytest.raises(ConnectionResetError):
                    while True:
                        await connection._reader.readline()
    connection = await Connection.open(echo, link)
    await asyncio.sleep(2 * network.FLAKY_INTERVAL_S[1])
    connection.send()
    await connection.until_answered()
    connection.close()


async def test_slow_delays_one_link(fleet: Fleet, connections: dict[str, Connection]) -> None:
    loop = asyncio.get_running_loop()
    async with NEMESES["slow"](fleet, random.Random(3)) as deed:
        way = deed.text.split()[0]
        expected_ms = sum(fleet.links[way].delay_ms.values())
        assert expected_ms > SHORT_S * 1000
        started = loop.time()
        connections[way].send()
        await connections[way].until_answered()
        assert (loop.time() - started) * 1000 >= expected_ms
    assert set(fleet.links[way].delay_ms.values()) == {0}
