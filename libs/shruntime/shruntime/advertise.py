"""The address that a service advertises to others."""

import asyncio
import logging
import socket
from collections.abc import Iterator

from shruntime.settings import CommonSettings
from shruntime.urls import is_unspecified

log = logging.getLogger(__name__)

# Reserved for documentation, so no machine has them: the route to them is the default route. A datagram socket that is
# connected sends nothing; it only asks the kernel for that route.
_ELSEWHERE = {socket.AF_INET: ("198.51.100.1", 9), socket.AF_INET6: ("2001:db8::1", 9)}


async def advertised_address(settings: CommonSettings, bound: str) -> str:
    """Returns the host:port for others: `advertise`, else `bound`, where the server listens.

    A server that listens on all addresses (0.0.0.0 or ::) advertises the address from which this machine reaches the
    coordinators, or else other machines: 0.0.0.0 cannot be connected to.
    """
    if settings.advertise:
        return settings.advertise
    host, _, port = bound.rpartition(":")
    if not is_unspecified(host):
        return bound
    found = await asyncio.to_thread(_own_address, settings.bootstrap)
    address = f"[{found}]:{port}" if ":" in found else f"{found}:{port}"
    if _is_loopback(found):
        log.warning("advertising %s, which no other machine reaches: set STREAMHOUSE_ADVERTISE", address)
    else:
        log.info("advertising %s; if others reach this service elsewhere, set STREAMHOUSE_ADVERTISE", address)
    return address


def _own_address(bootstrap: str) -> str:
    """Returns an address of this machine, IPv4 if there is one: towards the coordinators, or by the default route; a
    loopback address only if there is no other. Blocking: names are looked up."""
    found = list(_own_addresses(bootstrap))
    return next((address for address in found if not _is_loopback(address)), "127.0.0.1")


def _own_addresses(bootstrap: str) -> Iterator[str]:
    for coordinator in bootstrap.split(","):
        host, _, port = coordinator.strip().rpartition(":")
        try:
            targets = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)
        except (OSError, ValueError):  # a name that does not exist yet
            continue
        for family, _, _, _, target in targets:
            yield from _route_to(family, target)
    for kind, elsewhere in _ELSEWHERE.items():
        yield from _route_to(kind, elsewhere)


def _route_to(family: int, target: tuple[object, ...]) -> Iterator[str]:
    """Yields the address from which datagrams to `target` would be sent, if there is a route."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            yield str(probe.getsockname()[0])
    except OSError:
        return


def _is_loopback(address: str) -> bool:
    return address == "::1" or address.startswith("127.")
