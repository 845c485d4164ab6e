"""Telemetry with the SDK, in a process of its own: what it installs is global."""

import socket
import subprocess
import sys

import pytest

PROGRAM = """
import urllib.request, socket
from shruntime.settings import CommonSettings
from shruntime.telemetry import Telemetry
with socket.socket(socket.AF_INET6) as probe:
    probe.bind(("::1", 0))
    port = probe.getsockname()[1]
telemetry = Telemetry.configure("test", CommonSettings.load({}, prometheus_listen=f"[::1]:{port}"))
print(urllib.request.urlopen(f"http://[::1]:{port}/metrics").status)
telemetry.shutdown()
"""


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6")
def test_metrics_are_served_on_an_ipv6_address() -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=30)
    assert ended.stdout == "200\n", ended.stderr
