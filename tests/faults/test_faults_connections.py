"""Connections that a process has are seen, so that one past the proxies is."""

import os
import socket

from tests.faults.connections import ports_reached


def test_a_connection_is_seen_from_the_side_that_opened_it_until_it_is_closed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert port not in ports_reached(os.getpid())
        with socket.create_connection(("127.0.0.1", port)) as made:
            accepted, _ = server.accept()
            with accepted:
                own_port = made.getsockname()[1]
                assert {port, own_port} <= ports_reached(os.getpid())
        assert port not in ports_reached(os.getpid())


def test_a_process_that_has_ended_has_none() -> None:
    child = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(child, 0)
    assert ports_reached(child) == set()
