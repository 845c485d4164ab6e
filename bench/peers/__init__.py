"""Servers under the same loads, each on an empty directory of its own."""

from typing import Protocol


class Peer(Protocol):
    """A server process and its descendants. `system` names the loads' client, `address` is set by `start`."""

    system: str
    address: str

    @property
    def pid(self) -> int: ...

    def start(self) -> None: ...

    def stop(self) -> None: ...
