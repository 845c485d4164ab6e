"""systemd's side of the notify protocol, played by a datagram socket, and SIGHUP in this process."""

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from shruntime.logs import configure_logging
from shruntime.settings import CommonSettings, SettingsError
from shruntime.signals import survive_hangups
from shruntime.supervisor import UNSENT_MAX, Supervisor
from shruntime.tasks import Tasks, wait_for_stop


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    """NOTIFY_SOCKET and the socket behind it."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@streamhouse-test-{os.getpid()}-{id(tmp_path)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(f"\0{name[1:]}" if name.startswith("@") else name)
        receiver.setblocking(False)
        yield name, receiver


@pytest.fixture(autouse=True)
def _hangups_as_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def root_handlers() -> Iterator[None]:
    """configure_logging replaces the handlers of the root logger, pytest's among them."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    for handler in root.handlers:
        if handler not in before:
            handler.close()
    root.handlers[:], root.level = before, level


def told(receiver: socket.socket) -> list[str]:
    """All that has arrived so far."""
    found = []
    while True:
        try:
            found.append(receiver.recv(4096).decode())
        except BlockingIOError:
            return found


async def test_systemd_is_told_the_life_of_a_service_in_order(systemd: tuple[str, socket.socket]) -> None:
    name, receiver = systemd
    async with Supervisor.of({"NOTIFY_SOCKET": name}) as supervisor:
        assert told(receiver) == ["STATUS=starting"]
        supervisor.serving("127.0.0.1:7", False)  # servers say so when they bind
        assert told(receiver) == []
        supervisor.serving("127.0.0.1:7", True)
        assert told(receiver) == ["READY=1\nSTATUS=serving on 127.0.0.1:7"]
        supervisor.serving("127.0.0.1:7", False)
        supervisor.serving("127.0.0.1:7", True)
        assert told(receiver) == ["STATUS=not serving: waits for what it needs", "STATUS=serving on 127.0.0.1:7"]
        supervisor.stopping()
        supervisor.stopping()
        supervisor.serving("127.0.0.1:7", False)
    assert told(receiver) == ["STOPPING=1\nSTATUS=draining"]


async def test_the_watchdog_hears_of_a_loop_that_turns_and_of_no_other(systemd: tuple[str, socket.socket]) -> None:
    name, receiver = systemd
    environ = {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "100000", "WATCHDOG_PID": str(os.getpid())}
    async with Supervisor.of(environ):
        async with asyncio.timeout(30):
            while told(receiver).count("WATCHDOG=1") == 0:
                await asyncio.sleep(0.01)
        time.sleep(0.5)  # noqa: ASYNC251 - the loop stands still for five times the watchdog's time
        assert told(receiver) == []
        async with asyncio.timeout(30):
            while told(receiver) != ["WATCHDOG=1"]:
                await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)
    assert told(receiver) == [], "its task has ended"


@pytest.mark.parametrize(
    "environ",
    [{}, {"WATCHDOG_USEC": "20000", "WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "soon"}],
)
async def test_no_watchdog_without_a_time_that_is_meant_for_this_process(
    systemd: tuple[str, socket.socket], environ: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    name, receiver = systemd
    async with Supervisor.of(environ | {"NOTIFY_SOCKET": name}):
        await asyncio.sleep(0.1)
    assert told(receiver) == ["STATUS=starting"]
    assert ("WATCHDOG_USEC" in caplog.text) == (environ.get("WATCHDOG_USEC") in ("0", "soon"))


async def test_a_supervisor_that_reads_slowly_is_told_everything_later(systemd: tuple[str, socket.socket]) -> None:
    name, receiver = systemd
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.connect(f"\0{name[1:]}" if name.startswith("@") else name)
        other.setblocking(False)
        filled = 0
        with pytest.raises(BlockingIOError):
            while True:
                other.send(b"X=1")
                filled += 1
    async with Supervisor.of({"NOTIFY_SOCKET": name}) as supervisor:
        supervisor.serving("h:1", True)
        assert told(receiver) == ["X=1"] * filled
        found: list[str] = []
        async with asyncio.timeout(30):
            while len(found) < 2:
                await asyncio.sleep(0.01)
                found += told(receiver)
        assert found == ["STATUS=starting", "READY=1\nSTATUS=serving on h:1"]


async def test_a_socket_that_is_gone_is_logged_and_harms_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with Supervisor.of({"NOTIFY_SOCKET": str(tmp_path / "nobody")}) as supervisor:
        for _ in range(2 * UNSENT_MAX):
            supervisor.serving("h:1", True)
    assert "READY=1" in caplog.text and "No such file or directory" in caplog.text


@pytest.mark.parametrize("name", ["relative", "@", "vsock:2:1234"])
async def test_a_notify_socket_of_another_kind_is_named_and_not_used(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Supervisor.of({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "1000"}) as supervisor:
        supervisor.serving("h:1", True)
    assert [record.getMessage() for record in caplog.records] == [
        f"NOTIFY_SOCKET = {name!r} is neither a path nor an abstract socket (@name): not used"
    ]


def test_children_do_not_inherit_the_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.setenv(variable, "/1")
    Supervisor.of_environment()
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & set(os.environ)


# ---- SIGHUP


async def hang_up() -> None:
    os.kill(os.getpid(), signal.SIGHUP)
    await asyncio.sleep(0.05)  # the loop's handler runs in one of its next turns


async def test_a_hangup_tells_systemd_of_a_reload_and_changes_nothing_else(
    systemd: tuple[str, socket.socket], caplog: pytest.LogCaptureFixture
) -> None:
    name, receiver = systemd
    caplog.set_level(logging.INFO)
    async with Supervisor.of({"NOTIFY_SOCKET": name}) as supervisor:
        await hang_up()
        assert told(receiver) == ["STATUS=starting"], "it is not ready yet"
        supervisor.serving("h:1", True)
        told(receiver)
        before_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1_000
        await hang_up()
        reloading, ready = told(receiver)
        flag, _, monotonic = reloading.partition("\nMONOTONIC_USEC=")
        assert (flag, ready) == ("RELOADING=1", "READY=1") and int(monotonic) >= before_us
    os.kill(os.getpid(), signal.SIGHUP)  # between the service's end and the process's
    assert caplog.text.count("SIGHUP changes nothing here") == 2


async def test_a_hangup_opens_the_log_file_anew(tmp_path: Path, root_handlers: None) -> None:
    path = tmp_path / "service.log"
    configure_logging("test", CommonSettings.load({}, log_file=str(path)))
    log = logging.getLogger("here")
    async with Supervisor():
        log.info("one")
        path.rename(tmp_path / "service.log.1")
        log.info("two")
        await hang_up()
        log.info("three")
    before, after = (tmp_path / "service.log.1").read_text(), path.read_text()
    assert "one" in before and "two" in before and "three" not in before
    assert f"the log goes on in {path}, opened anew" in after and "three" in after and "two" not in after


async def test_a_log_file_that_cannot_be_opened_anew_goes_on_as_it_is(tmp_path: Path, root_handlers: None) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    configure_logging("test", CommonSettings.load({}, log_file=str(folder / "service.log")))
    async with Supervisor():
        folder.rename(tmp_path / "moved")
        await hang_up()
        logging.getLogger("here").info("after")
    text = (tmp_path / "moved" / "service.log").read_text()
    assert "cannot be opened anew, the old one is kept" in text and "after" in text
    assert not folder.exists()


def test_a_log_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "service.log"
    with pytest.raises(SettingsError, match=r"log_file \(STREAMHOUSE_LOG_FILE\) = '.*': No such file or directory"):
        configure_logging("test", CommonSettings.load({}, log_file=str(path)))


@pytest.mark.parametrize("log_json", [False, True])
async def test_a_log_message_is_one_line_whatever_is_in_it(tmp_path: Path, root_handlers: None, log_json: bool) -> None:
    path = tmp_path / "service.log"
    configure_logging("test", CommonSettings.load({}, log_file=str(path), log_json=log_json))
    async with Supervisor.of({"NOTIFY_SOCKET": "/nowhere\n2026-01-01 ERROR forged\x1b[2J\u2028"}) as supervisor:
        supervisor.serving("127.0.0.1:1", True)
    logging.getLogger("here").warning("a file named %s", "a\r\nb")
    lines = path.read_text().splitlines()
    assert len(lines) == 3 and not any("\x1b" in line for line in lines)
    assert "/nowhere" in lines[0] and "READY=1" in lines[1] and "a file named a" in lines[2]


@pytest.mark.parametrize("notify_socket", ["/nowhere\nforged", "nowhere\nforged"])
async def test_what_is_said_of_a_socket_of_no_use_is_one_line(
    notify_socket: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Supervisor.of({"NOTIFY_SOCKET": notify_socket}) as supervisor:
        supervisor.serving("127.0.0.1:1", True)
    assert caplog.messages and all("NOTIFY_SOCKET" in message for message in caplog.messages)
    assert [message for message in caplog.messages if "\n" in message] == []


async def test_a_signal_while_a_service_drains_does_what_it_did_before() -> None:
    before, came = {}, []
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, lambda number, frame: came.append(number))
    try:
        waiting = asyncio.create_task(wait_for_stop(Tasks(), Supervisor()))
        await asyncio.sleep(0)
        os.kill(os.getpid(), signal.SIGTERM)
        await waiting
        assert came == []
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert came == [signal.SIGINT, signal.SIGTERM]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def test_a_hangup_that_is_ignored_at_the_start_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    survive_hangups()
    async with Supervisor():
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
