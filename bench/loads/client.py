"""Starts client processes and reads their figures."""

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from bench.common import Wrong
from bench.loads.__main__ import BEGAN
from bench.peers import Peer

TIMEOUT_S = 300
Figures = dict[str, float]


def run(peer: Peer, load: str, topic: str, **options: float) -> Figures:
    """Runs a load; returns the figures that it printed. Raises Wrong where it failed or took longer than TIMEOUT_S."""
    with _started(peer, load, topic, options) as process:
        return _figures(process)


def latency(peer: Peer, topic: str, records_per_s: int, seconds: float, record_bytes: int) -> Figures:
    """Returns percentiles of the ms from when a record was due until a consumer had it, and the CPU seconds of both
    clients."""
    options = {"records-per-s": records_per_s, "seconds": seconds, "record-bytes": record_bytes}
    with _started(peer, "listen", topic, options) as listening:
        assert listening.stdout is not None
        if listening.stdout.readline().strip() != BEGAN:
            raise Wrong(f"{peer.system} listen ended before it began")
        with _started(peer, "pace", topic, options) as pacing:
            sent = _figures(pacing)
        heard = _figures(listening)
    listen_cpu_s = heard.pop("cpu_s")
    return {**heard, "pace_cpu_s": sent["cpu_s"], "listen_cpu_s": listen_cpu_s}


@contextmanager
def _started(peer: Peer, load: str, topic: str, options: dict[str, float]) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", "bench.loads", peer.system, peer.address, load, "--topic", topic]
    command += [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", f"{value:g}")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def _figures(process: "subprocess.Popen[str]") -> Figures:
    command = process.args
    assert isinstance(command, list)
    try:
        out, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise Wrong(f"{shlex.join(command)} took longer than {TIMEOUT_S} s") from error
    if process.returncode != 0:
        raise Wrong(f"{shlex.join(command)} ended with exit code {process.returncode}")
    figures: Figures = json.loads(out.splitlines()[-1])
    return figures
