"""The life of a service process, the same for all: prepare, listen, start, serve, drain, end.

Owns: the order of start and stop, the gRPC server of the process, and its resources (connections, stores).
Does not own: the service's work, which it starts and stops; the handlers of signals (tasks.py, supervisor.py).
Invariants: the server listens before the service starts, so that health checks are answered while it waits; health
says SERVING only while the service is started and none of its parts has failed; resources are closed after the service
has stopped, the last one opened first.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from google.protobuf.descriptor import ServiceDescriptor

from shruntime.advertise import advertised_address
from shruntime.descriptors import raise_descriptor_limit
from shruntime.logs import configure_logging
from shruntime.memory import give_back_freed_memory, log_memory_limits, spare_loaded_code
from shruntime.server import RpcServer, ServerLimits
from shruntime.settings import CommonSettings
from shruntime.supervisor import Supervisor
from shruntime.tasks import Tasks, wait_for_stop
from shruntime.telemetry import Telemetry

log = logging.getLogger(__name__)

Apis = Sequence[tuple[ServiceDescriptor, object]]


class Service(Protocol):
    """A service as its process sees it. `apis`: RPC services of the gRPC server, beside health and reflection."""

    @property
    def apis(self) -> Apis: ...

    async def start(self, address: str, /) -> None:
        """Returns once the service serves, however long that takes; it may be cancelled. `address`: host:port at which
        others reach the process. Raises the error that ends the process."""

    async def failed(self) -> None:
        """Waits until a part of the service cannot go on. Raises the part's error; never returns."""

    async def stop(self) -> None:
        """Drains and ends the service, also if its start failed or was cancelled."""


class ServiceContext:
    """The parts of the process that a service is built over."""

    def __init__(self, telemetry: Telemetry, resources: contextlib.AsyncExitStack) -> None:
        self.telemetry = telemetry
        self._resources = resources
        self._needs: list[Callable[[], Awaitable[object]]] = []

    def close_at_end(self, close: Callable[[], Awaitable[object]]) -> None:
        """Registers a resource's `close`, which is awaited once service and server have stopped."""
        self._resources.push_async_callback(close)

    def wait_for(self, need: Callable[[], Awaitable[object]]) -> None:
        """Registers a check of something that the service needs (the object store); it is awaited before the service
        starts, and while it waits the process can be stopped. An error of it ends the process."""
        self._needs.append(need)

    async def needs_met(self) -> None:
        """Returns once all checks have passed, one after the other. Raises the error of the first that fails."""
        for need in self._needs:
            await need()


def prepare_process(name: str, settings: CommonSettings) -> None:
    """Configures logs, file descriptors and memory of this process. `name`: of the service, in plain log lines. Raises
    SettingsError (a log file that cannot be opened)."""
    configure_logging(name, settings)
    raise_descriptor_limit()
    give_back_freed_memory()
    spare_loaded_code()


async def run(
    settings: CommonSettings,
    build: Callable[[ServiceContext], Service],
    *,
    call_grace_ms: int,
    calls_end_first: bool = False,
    on_serving: Callable[[str], None] = lambda address: None,
) -> None:
    """Runs one service until SIGINT or SIGTERM, then drains. `build` returns the service over its peers, without I/O.

    call_grace_ms: how long calls that still run may take at the end. calls_end_first: True ends them before the service
    stops; by default the service stops first, since it answers calls that wait and hands over its work. on_serving:
    called with the address on which the server listens, once the service has started.

    Raises SettingsError, or the error that ended the process: ListenError, an error of the service's start, or the
    failure of a part.
    """
    prepare_process(settings.service, settings)
    log_memory_limits(settings)
    async with contextlib.AsyncExitStack() as resources:
        supervisor = await resources.enter_async_context(Supervisor.of_environment())
        telemetry = Telemetry.configure(settings.service, settings)
        resources.callback(telemetry.shutdown)
        context = ServiceContext(telemetry, resources)
        service = build(context)
        limits = ServerLimits.of(settings)
        server = RpcServer(settings.listen, service.apis, telemetry.server(), limits, supervisor)
        await server.start()
        log.info("listening on %s", server.address)
        if calls_end_first:
            resources.push_async_callback(service.stop)
            resources.push_async_callback(server.stop, call_grace_ms)
        else:
            resources.push_async_callback(server.stop, call_grace_ms)
            resources.push_async_callback(service.stop)
        tasks = Tasks()
        try:
            # In the background, so that a stop is heard while the service waits for a store or a coordinator; beside
            # each other, so that a part that fails meanwhile ends the process, too.
            tasks.spawn(f"{settings.service} start", _start(settings, context, service, server, on_serving))
            tasks.spawn(settings.service, service.failed())
            await wait_for_stop(tasks, supervisor)
        finally:
            await server.set_serving(False)
            await tasks.stop()


async def _start(
    settings: CommonSettings,
    context: ServiceContext,
    service: Service,
    server: RpcServer,
    on_serving: Callable[[str], None],
) -> None:
    await context.needs_met()
    await service.start(await advertised_address(settings, server.address))
    await server.set_serving(True)
    log.info("serving on %s", server.address)
    on_serving(server.address)
