"""Holds what the mark `quick` says of a test: it opens no socket and starts no process."""

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator
from typing import NoReturn

import grpc
import grpc.aio
import pytest

# Where connections and processes begin. socket.socketpair, with which every event loop wakes itself, stays.
DOORS = (
    (socket.socket, "bind"),
    (socket.socket, "connect"),
    (socket.socket, "connect_ex"),
    (subprocess.Popen, "__init__"),
    (os, "fork"),
    (grpc, "insecure_channel"),
    (grpc, "server"),
    (grpc.aio, "insecure_channel"),
    (grpc.aio, "server"),
)


@contextlib.contextmanager
def closed_doors() -> Iterator[None]:
    """Inside the block whatever opens a socket or starts a process fails the test."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in DOORS:
            patch.setattr(owner, name, _refusal(f"{getattr(owner, '__name__', owner)}.{name}"))
        yield


def _refusal(name: str) -> object:
    def refuse(*_: object, **__: object) -> NoReturn:
        pytest.fail(f"marked quick, and calls {name}: take the mark away")

    return refuse
