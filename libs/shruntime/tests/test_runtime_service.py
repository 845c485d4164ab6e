"""The life of a service process: its order of start and stop, and the error that ends it."""

import asyncio
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from shproto.rpc import Connection
from shproto.services import CoordinatorClient
from shproto.v1 import coordinator_pb2
from shruntime.server import ListenError
from shruntime.service import Apis, ServiceContext, run
from shruntime.settings import CommonSettings
from shruntime.tasks import cancel_and_wait

SETTINGS = CommonSettings(listen="127.0.0.1:0", advertise="here:1")


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


class Recorded:
    """A service that notes what is done with it; its store and coordinator are there when the test says so."""

    apis: Apis = ()

    def __init__(self) -> None:
        self.noted: list[str] = []
        self.store_answers, self.starts, self.fails = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.started = asyncio.Event()
        self.start_error: Exception | None = None

    def build(self, context: ServiceContext) -> "Recorded":
        context.close_at_end(lambda: self._note("store closed"))
        context.wait_for(self._store_check)
        context.close_at_end(lambda: self._note("connections closed"))
        return self

    async def _note(self, what: str) -> None:
        self.noted.append(what)

    async def _store_check(self) -> None:
        self.noted.append("store asked")
        await self.store_answers.wait()

    async def start(self, address: str) -> None:
        self.noted.append(f"start at {address}")
        await self.starts.wait()
        if self.start_error is not None:
            raise self.start_error
        self.noted.append("started")
        self.started.set()

    async def failed(self) -> None:
        await self.fails.wait()
        raise RuntimeError("a part of it is broken")

    async def stop(self) -> None:
        self.noted.append("stopped")


async def until_noted(service: Recorded, what: str) -> None:
    async with asyncio.timeout(30):
        while what not in service.noted:
            await asyncio.sleep(0.001)


ENDED = ["stopped", "connections closed", "store closed"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_service_starts_once_its_needs_are_met_and_stops_in_the_reverse_order(number: signal.Signals) -> None:
    service = Recorded()
    running = asyncio.create_task(run(SETTINGS, service.build, call_grace_ms=0))
    await until_noted(service, "store asked")
    service.store_answers.set()
    await until_noted(service, "start at here:1")
    service.starts.set()
    await service.started.wait()
    os.kill(os.getpid(), number)
    await running
    assert service.noted == ["store asked", "start at here:1", "started", *ENDED]


async def test_a_service_that_waits_for_its_store_can_be_stopped() -> None:
    service = Recorded()
    running = asyncio.create_task(run(SETTINGS, service.build, call_grace_ms=0))
    await until_noted(service, "store asked")
    os.kill(os.getpid(), signal.SIGTERM)
    await running
    assert service.noted == ["store asked", *ENDED]


async def test_the_error_of_a_start_ends_the_process_after_everything_is_closed() -> None:
    service = Recorded()
    service.store_answers.set()
    service.starts.set()
    service.start_error = ValueError("refused")
    with pytest.raises(ValueError, match="refused"):
        await run(SETTINGS, service.build, call_grace_ms=0)
    assert service.noted == ["store asked", "start at here:1", *ENDED]


@pytest.mark.parametrize("while_starting", [True, False])
async def test_a_part_that_fails_ends_the_process_also_while_it_starts(while_starting: bool) -> None:
    service = Recorded()
    service.store_answers.set()
    running = asyncio.create_task(run(SETTINGS, service.build, call_grace_ms=0))
    await until_noted(service, "start at here:1")
    if not while_starting:
        service.starts.set()
        await service.started.wait()
    service.fails.set()
    with pytest.raises(RuntimeError, match="a part of it is broken"):
        await running
    assert service.noted[-3:] == ENDED


async def test_an_address_that_is_taken_ends_the_process_before_the_service_starts() -> None:
    taken = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = taken.sockets[0].getsockname()[1]
    service = Recorded()
    async with taken:
        with pytest.raises(ListenError):
            await run(SETTINGS.model_copy(update={"listen": f"127.0.0.1:{port}"}), service.build, call_grace_ms=0)
    assert service.noted == ["connections closed", "store closed"]


def logged_address(log_file: Path) -> str:
    """Returns the address that the process has logged; empty if it does not listen yet."""
    lines = log_file.read_text().splitlines() if log_file.exists() else []
    return next((line.rpartition(" ")[2] for line in lines if "listening on " in line), "")


async def listening_at(log_file: Path) -> str:
    async with asyncio.timeout(30):
        while not (address := logged_address(log_file)):
            await asyncio.sleep(0.001)
    return address


async def test_health_says_serving_only_once_the_service_has_started(tmp_path: Path) -> None:
    service, log_file = Recorded(), tmp_path / "log"
    service.store_answers.set()
    settings = SETTINGS.model_copy(update={"log_file": str(log_file)})
    running = asyncio.create_task(run(settings, service.build, call_grace_ms=0))
    await until_noted(service, "start at here:1")
    address = await listening_at(log_file)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]

        async def state() -> int:
            return int((await stub.Check(health_pb2.HealthCheckRequest())).status)

        assert await state() == health_pb2.HealthCheckResponse.NOT_SERVING
        service.starts.set()
        async with asyncio.timeout(30):
            while await state() != health_pb2.HealthCheckResponse.SERVING:
                pass
    os.kill(os.getpid(), signal.SIGTERM)
    await running
    assert f"serving on {address}" in log_file.read_text()


class Coordinator:
    """Answers no call, whichever it is, and notes the one that the server cuts."""

    def __init__(self, noted: list[str]) -> None:
        self._noted = noted

    def __getattr__(self, name: str) -> Callable[[Any], Awaitable[Any]]:
        return self._wait

    async def _wait(self, request: object) -> None:
        self._noted.append("called")
        try:
            await asyncio.Event().wait()
        finally:
            self._noted.append("cut")


@pytest.mark.parametrize("calls_end_first", [True, False])
async def test_calls_end_before_or_after_the_service_as_it_asks(calls_end_first: bool, tmp_path: Path) -> None:
    service, log_file = Recorded(), tmp_path / "log"
    service.store_answers.set()
    service.starts.set()
    service.apis = [(coordinator_pb2.DESCRIPTOR.services_by_name["Coordinator"], Coordinator(service.noted))]
    settings = SETTINGS.model_copy(update={"log_file": str(log_file)})
    running = asyncio.create_task(run(settings, service.build, call_grace_ms=1, calls_end_first=calls_end_first))
    connection = Connection([await listening_at(log_file)])
    calling = asyncio.create_task(CoordinatorClient(connection).get_head(coordinator_pb2.GetHeadRequest()))
    await service.started.wait()
    await until_noted(service, "called")
    os.kill(os.getpid(), signal.SIGTERM)
    await running
    await cancel_and_wait(calling)
    await connection.close()
    assert [what for what in service.noted if what in ("cut", "stopped")] == (
        ["cut", "stopped"] if calls_end_first else ["stopped", "cut"]
    )
