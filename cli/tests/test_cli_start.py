"""Signals that come while a command starts, which takes a second: most of it imports."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.long

PATIENCE_S = 60


def long(*values):
    """One more place or signal of a sweep, which make test-all runs."""
    return pytest.param(*values, marks=pytest.mark.long)


# As the script that an installation makes, and where that is not on PATH.
ENTRIES = {
    "script": [sys.executable, "-c", "import sys; from streamhouse_cli import main; sys.exit(main())"],
    "module": [sys.executable, "-m", "streamhouse"],
}
# Loaded by Python itself, before everything: holds the import of GATE until a byte comes, having told of it.
SITE = """
    import os, sys

    arrived, leave = map(int, os.environ["GATE_PIPES"].split())

    class Gate:
        def find_spec(self, name, path=None, target=None):
            if name == os.environ["GATE"]:
                sys.meta_path.remove(self)
                os.write(arrived, b".")
                os.read(leave, 1)

    sys.meta_path.insert(0, Gate())
"""
# A service that comes to read its settings ends with an error that names this one.
BROKEN = {"STREAMHOUSE_RPC_TIMEOUT_MS": "7"}


@pytest.fixture
def started(tmp_path):
    """Runs a command up to the import of a module, sends the signals, and lets it go on; returns its end."""
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(SITE))

    def start(command, gate, *numbers, before=()):
        arrived, arrives = os.pipe()
        leaves, leave = os.pipe()
        environ = {name: value for name, value in os.environ.items() if not name.startswith("STREAMHOUSE_")}
        environ |= {"PYTHONPATH": str(tmp_path), "GATE": gate, "GATE_PIPES": f"{arrives} {leaves}"} | BROKEN
        process = subprocess.Popen(
            [*before, *command],
            env=environ,
            pass_fds=(arrives, leaves),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        os.close(arrives)
        os.close(leaves)
        try:
            assert os.read(arrived, 1) == b".", f"{gate} is not imported: {process.communicate(timeout=PATIENCE_S)}"
            for number in numbers:
                process.send_signal(number)
            with contextlib.suppress(BrokenPipeError):  # it has ended, as it should
                os.write(leave, b".")
            out, err = process.communicate(timeout=PATIENCE_S)
            return process.returncode, out, err
        finally:
            process.kill()
            process.communicate()
            os.close(arrived)
            os.close(leave)

    return start


@pytest.mark.smoke
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), long(signal.SIGTERM, 143), long(signal.SIGHUP, 129)]
)
@pytest.mark.parametrize("gate", ["click", long("grpc")])
def test_a_command_that_starts_ends_without_a_word(started, entry, number, code, gate):
    command = [*ENTRIES[entry], "topic", "list", "--bootstrap", "127.0.0.1:1"]
    assert started(command, gate, number) == (code, "", "")


@pytest.mark.parametrize("gate", ["click", "grpc"])
def test_a_second_signal_makes_no_difference(started, gate):
    command = [*ENTRIES["script"], "produce", "t", "--bootstrap", "127.0.0.1:1"]
    assert started(command, gate, signal.SIGTERM, signal.SIGINT)[1:] == ("", "")


@pytest.mark.parametrize("gate", [long("click"), "shruntime.settings"])
@pytest.mark.parametrize("service", ["serve", "ingest", "query", "coordinator", "segmenter"])
def test_a_service_that_starts_survives_a_reload(started, gate, service):
    code, _, err = started([*ENTRIES["script"], service], gate, signal.SIGHUP)
    assert code == 1 and err.startswith("error: ") and "rpc_timeout_ms" in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), long(signal.SIGTERM, 143)])
@pytest.mark.parametrize("gate", [long("click"), "shruntime.settings"])
@pytest.mark.parametrize("service", ["serve"])
def test_a_service_that_starts_ends_without_a_word(started, number, code, gate, service):
    assert started([*ENTRIES["script"], service], gate, number) == (code, "", "")


# ---- the segmenter becomes another program: nameko has to be prepared for before anything else is imported

SEGMENTER = {"command": [*ENTRIES["script"], "segmenter"], "module": [sys.executable, "-m", "streamhouse_segmenter"]}


@pytest.mark.parametrize("gate", ["streamhouse_segmenter", long("eventlet"), long("streamhouse_segmenter.wiring")])
def test_a_segmenter_that_is_between_two_programs_survives_a_reload(started, gate):
    code, _, err = started(SEGMENTER["command"], gate, signal.SIGHUP)
    assert code == 1 and err.startswith("error: ") and "rpc_timeout_ms" in err


@pytest.mark.parametrize("gate", ["eventlet", long("streamhouse_segmenter.wiring")])
def test_a_segmenter_of_its_own_survives_a_reload(started, gate):
    code, _, err = started(SEGMENTER["module"], gate, signal.SIGHUP)
    assert code == 1 and err.startswith("error: ") and "rpc_timeout_ms" in err


@pytest.mark.parametrize(("number", "code"), [long(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("gate", ["streamhouse_segmenter", long("eventlet")])
def test_a_segmenter_that_is_between_two_programs_ends_without_a_word(started, number, code, gate):
    assert started(SEGMENTER["command"], gate, number) == (code, "", "")


@pytest.mark.parametrize("service", ["coordinator", "segmenter"])
def test_a_service_started_with_nohup_survives_too(started, service):
    command = [*ENTRIES["script"], service]
    code, _, err = started(command, "shruntime.settings", signal.SIGHUP, before=["nohup"])
    assert code == 1 and "rpc_timeout_ms" in err


# ---- the interpreter's own end, after everything of ours

# Held by a module: goes when modules are torn down.
LAST = """
    import os

    arrived, leave = map(int, os.environ["GATE_PIPES"].split())

    class Last:
        def __del__(self, write=os.write, read=os.read):
            write(arrived, b".")
            read(leave, 1)

    last = Last()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_the_interpreter_ends_changes_no_exit_code(started, tmp_path, number):
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(LAST))
    code, out, err = started([*ENTRIES["script"], "topic", "--help"], "the end", number)
    assert code == 0 and "create" in out and not err
