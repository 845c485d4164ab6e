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


CROWD = """
import socket, sys, time, urllib.request
from shruntime import metrics_page
metrics_page.SILENCE_S_MAX = metrics_page._Handler.timeout = 0.5
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
metrics_page.serve_metrics("127.0.0.1", port)
silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
closed = [connection.recv(1) for connection in silent]  # at once, or once they were silent for too long
assert closed == [b""] * 100
print(urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").status)
"""


NO_THREADS = """
import socket, threading, urllib.request
from shruntime import metrics_page
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
metrics_page.serve_metrics("127.0.0.1", port)
start = threading.Thread.start
def refuse(thread):
    raise RuntimeError("can't start new thread")
threading.Thread.start = refuse
for _ in range(metrics_page.REQUESTS_MAX + 1):
    assert socket.create_connection(("127.0.0.1", port)).recv(1) == b""
threading.Thread.start = start
print(urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").status)
"""


def test_metrics_are_served_again_after_no_thread_could_be_started() -> None:
    ended = subprocess.run([sys.executable, "-c", NO_THREADS], capture_output=True, text=True, timeout=60)
    assert ended.stdout == "200\n", ended.stderr


def test_silent_clients_do_not_keep_others_from_the_metrics() -> None:
    ended = subprocess.run([sys.executable, "-c", CROWD], capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.stderr) == ("200\n", "")


FROM_START = """
import socket, urllib.request
from opentelemetry import metrics
from prometheus_client.parser import text_string_to_metric_families
from shruntime.counters import counter, up_down_counter
from shruntime.settings import CommonSettings
from shruntime.telemetry import Telemetry
meter = metrics.get_meter("test")
counter(meter, "before_total", "made before", label="why", values=("store", "peer"))
up_down_counter(meter, "open", "made before")
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
Telemetry.configure("test", CommonSettings.load({}, prometheus_listen=f"127.0.0.1:{port}"))
counter(meter, "after_total", "made after")
page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
for family in text_string_to_metric_families(page):
    for sample in family.samples:
        if sample.name in ("before_total", "open", "after_total"):
            print(sample.name, sample.labels.get("why"), sample.value)
"""


def test_counters_are_there_from_the_start_at_0() -> None:
    ended = subprocess.run([sys.executable, "-c", FROM_START], capture_output=True, text=True, timeout=60)
    lines = ["before_total store 0.0", "before_total peer 0.0", "open None 0.0", "after_total None 0.0"]
    assert ended.stdout.splitlines() == lines, ended.stderr


SILENT_COLLECTOR = """
import logging, socket, sys
from opentelemetry import trace
from shruntime.settings import CommonSettings
from shruntime.telemetry import Telemetry
logging.basicConfig(format="%(name)s %(message)s", stream=sys.stdout, level=logging.WARNING)
with socket.create_server(("127.0.0.1", 0)) as silent:
    endpoint = "http://127.0.0.1:%d" % silent.getsockname()[1]
    settings = CommonSettings.load({}, otlp_endpoint=endpoint, trace_sample_ratio=1, otlp_flush_timeout_ms=200)
    telemetry = Telemetry.configure("test", settings)
    with trace.get_tracer("test").start_as_current_span("work"):
        pass
    telemetry.shutdown()
    print("stopped", flush=True)
"""


def test_a_silent_collector_delays_a_stop_by_the_flush_timeout_only() -> None:
    """The exporters' own limits are 10 and 30 s, and their handlers at exit would wait once more."""
    ended = subprocess.run([sys.executable, "-c", SILENT_COLLECTOR], capture_output=True, text=True, timeout=60)
    lines = [line for line in ended.stdout.splitlines() if not line.startswith("opentelemetry")]
    assert lines == [
        "shruntime.telemetry the last traces and metrics are dropped: the collector has not taken them within "
        "otlp_flush_timeout_ms = 200",
        "stopped",
    ], ended
    assert ended.returncode == 0
