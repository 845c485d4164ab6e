"""Limits of a server's connections, in all and from one address.

gRPC refuses connections beyond a number in all, and closes silent ones; it knows no limit per address. That limit is
kept from outside: a task looks at the process's own sockets every LOOK_INTERVAL_S, and shuts down those beyond an
address's limit. So an address may exceed its limit for that long, within the limit of all.

Owns: the server's sockets seen so far, and their order. Does not own: the sockets, which are gRPC's; a socket that was
shut down reads as if the client had hung up. Invariant: of the connections of an address those that came first are
kept.
"""

import asyncio
import logging
import os
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from shruntime.descriptors import connections_allowed
from shruntime.settings import CommonSettings

log = logging.getLogger(__name__)

LOOK_INTERVAL_S = 1.0
OPEN_FILES = "/proc/self/fd"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """Connection limits of a server; the defaults are those of the settings."""

    connections_max: int = 10_000
    per_address_max: int = 5_000
    handshake_timeout_ms: int = 10_000

    @classmethod
    def of(cls, settings: CommonSettings) -> "ConnectionLimits":
        """Returns the limits of the settings, as far as this process's file descriptors allow."""
        allowed = connections_allowed(settings.connections_max)
        if allowed < settings.connections_max:
            log.warning(
                "connections are limited to %d, not connections_max = %d: too few open files are allowed (ulimit -n)",
                allowed,
                settings.connections_max,
            )
        return cls(
            connections_max=allowed,
            per_address_max=max(1, min(settings.connections_per_address_max, allowed // 2)),
            handshake_timeout_ms=settings.connection_handshake_timeout_ms,
        )

    def channel_options(self) -> tuple[tuple[str, int], ...]:
        """Returns the part of the limits that gRPC enforces."""
        return (
            ("grpc.max_allowed_incoming_connections", self.connections_max),
            ("grpc.server_handshake_timeout_ms", self.handshake_timeout_ms),
        )


class AddressLimit:
    """Keeps the connections to `port` of this process within `per_address_max` for each address."""

    def __init__(self, port: int, per_address_max: int) -> None:
        self._port = port
        self._per_address_max = per_address_max
        self._peers: dict[int, str] = {}  # by inode, in the order in which they were first seen; "": not of this server

    async def run(self) -> None:
        """Looks in a loop until cancelled."""
        while True:
            await asyncio.sleep(LOOK_INTERVAL_S)
            for address, count in (await asyncio.to_thread(self.enforce)).items():
                log.warning(
                    "%d connections of %s beyond connections_per_address_max = %d were closed",
                    count,
                    address,
                    self._per_address_max,
                )

    def enforce(self) -> dict[str, int]:
        """Shuts down connections beyond the limit; returns the number of connections by address. Blocking."""
        try:
            with os.scandir(OPEN_FILES) as entries:
                descriptors = [int(entry.name) for entry in entries]
        except OSError:  # no descriptor left to look with: the limit of all connections holds
            return {}
        # With fewer open files than one address may have connections, no address exceeds its limit.
        if len(descriptors) <= self._per_address_max:
            self._peers.clear()
            return {}
        found = dict(self._sockets(descriptors))
        self._peers = {inode: peer for inode, peer in self._peers.items() if inode in found}
        for inode, descriptor in found.items():
            if inode not in self._peers:
                peer = self._peer_of(descriptor, inode)
                if peer is not None:
                    self._peers[inode] = peer
        counts: dict[str, int] = {}
        closed: dict[str, int] = {}
        for inode, peer in self._peers.items():
            counts[peer] = counts.get(peer, 0) + 1
            if peer and counts[peer] > self._per_address_max and _shut_down(found[inode], inode):
                closed[peer] = closed.get(peer, 0) + 1
        return closed

    def _sockets(self, descriptors: list[int]) -> Iterator[tuple[int, int]]:
        """Yields (inode, descriptor): an inode names a socket for as long as it is open."""
        for descriptor in descriptors:
            try:
                status = os.fstat(descriptor)
            except OSError:  # closed meanwhile
                continue
            if stat.S_ISSOCK(status.st_mode):
                yield status.st_ino, descriptor

    def _peer_of(self, descriptor: int, inode: int) -> str | None:
        """Returns the address at the other end; empty for anything but a connection to `port`, None if unknown: the
        socket is gone, or no descriptor is left to hold it with. The next look asks again."""
        held = _hold(descriptor, inode)
        if held is None:
            return None
        with held:
            try:
                if held.family not in (socket.AF_INET, socket.AF_INET6) or held.getsockname()[1] != self._port:
                    return ""
                return str(held.getpeername()[0]).removeprefix("::ffff:")
            except OSError:  # it listens, or was closed from the other end
                return ""


def _hold(descriptor: int, inode: int) -> socket.socket | None:
    """Returns the socket under a descriptor of its own, so that it stays open meanwhile; None if it is gone, or no
    descriptor is left."""
    try:
        number = os.dup(descriptor)
    except OSError:
        return None
    try:
        held = socket.socket(fileno=number)
    except OSError:  # the descriptor belongs to a file now
        os.close(number)
        return None
    if os.fstat(held.fileno()).st_ino != inode:  # the number was given to something else
        held.close()
        return None
    return held


def _shut_down(descriptor: int, inode: int) -> bool:
    held = _hold(descriptor, inode)
    if held is None:
        return False
    with held:
        try:
            # Not closed: the descriptor is gRPC's, and its number could be another file's while gRPC uses it.
            held.shutdown(socket.SHUT_RDWR)
        except OSError:
            return False
    return True
