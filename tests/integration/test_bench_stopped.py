"""A bench that is stopped leaves nothing running."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 100


def running_on(folder: Path) -> list[int]:
    """Returns the processes whose command line names the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:  # ended meanwhile
            continue
        if f"{folder}/streamhouse-bench-".encode() in line:
            found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, -signal.SIGINT)])
def test_a_bench_ends_its_platform_when_it_is_stopped(tmp_path: Path, number: signal.Signals, code: int) -> None:
    options = ["--runs", "1", "--seconds", "600", "--no-loads", "--no-codec", "--dir", str(tmp_path)]
    command = [sys.executable, "-m", "bench.end_to_end", *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as bench:
        try:
            deadline = time.monotonic() + TIMEOUT_S
            while not any(tmp_path.glob("streamhouse-bench-*/data/wal/*")):
                assert bench.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
            bench.send_signal(number)
            _, err = bench.communicate(timeout=TIMEOUT_S)
        finally:
            bench.kill()
    left = running_on(tmp_path)
    for pid in left:
        os.kill(pid, signal.SIGTERM)
    assert bench.returncode == code, err.decode()
    assert left == []
    assert list(tmp_path.iterdir()) == []
