"""Nemeses of processes and of the machine they run on do what they say, to whom they say, and undo it."""

import asyncio
import errno
import random
import resource
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.faults import shim
from tests.faults.fleet import AGENTS, DESCRIPTORS_MAX, SERVICES, SMALL_DISK_AGENT, Fleet, FleetProcess, Member
from tests.faults.history import ProcessDied, Recorder, read_history
from tests.faults.nemeses import NEMESES, machine
from tests.faults.nemesis import NotPossible
from tests.faults.proxy import FaultProxy
from tests.integration import small_disk
from tests.integration.processes import free_ports

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

PATIENCE_S = 30
LISTENING = "0A"  # of /proc/net/tcp
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
EMFILE, ENOSPC, EIO = str(errno.EMFILE), errno.ENOSPC, str(errno.EIO)


class Standins(Fleet):
    """A fleet of processes that do nothing but run, each behind the links that clients have to it."""

    async def add(self, *names: str) -> None:
        """Starts them; all others have a fault already, so that nothing else is hit."""
        self.library = shim.build(self.work_dir)
        for name, port in zip(names, free_ports(len(names)), strict=True):
            listen = f"127.0.0.1:{port}"
            control = shim.Control(self.work_dir / f"{name}.control")
            environ = control.environ(self.library) if self.library is not None else {}
            process = FleetProcess(name, [], environ, self.work_dir)
            program = str(Path(__file__).with_name("standin.py"))
            process.arguments = [sys.executable, program, listen, str(self.work_dir / f"{name}.port")]
            self.members[name] = Member(name, process, listen, control)
            link = self.links[f"clients>{name}"] = FaultProxy(name, listen)
            await link.start()
        await asyncio.gather(*(self.start_process(name) for name in names))
        self.busy = set(SERVICES) - set(names)

    async def ask(self, name: str, expression: str) -> str:
        """Return what the process makes of it, once the process has no descriptor of the question any more."""
        asking = await self.open(name)
        asking[1].write(f"{expression}\n".encode())
        return (await self.end(asking)).strip()

    async def open(self, name: str) -> Connection:
        """Return a connection to the process that asks it nothing yet."""
        return await asyncio.open_connection("127.0.0.1", int((self.work_dir / f"{name}.port").read_text()))

    async def end(self, asking: Connection) -> str:
        """Return the answers not read yet; the process has closed its end of the connection."""
        reader, writer = asking
        async with asyncio.timeout(PATIENCE_S):
            try:
                writer.write_eof()
                return (await reader.read()).decode()
            finally:
                writer.close()

    def descriptors_of(self, name: str) -> int:
        """How many it has open."""
        return len(list(Path(f"/proc/{self.members[name].process.pid}/fd").iterdir()))

    def state_of(self, name: str) -> str:
        """R, S, T (stopped), ...; as in /proc."""
        return Path(f"/proc/{self.members[name].process.pid}/stat").read_text().rpartition(")")[2].split()[0]

    async def is_refused(self, name: str) -> bool:
        host, _, port = self.links[f"clients>{name}"].address.rpartition(":")
        try:
            _, writer = await asyncio.open_connection(host, int(port))
        except ConnectionRefusedError:
            return True
        writer.close()
        return False


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Standins]:
    made = Standins(tmp_path, Recorder(tmp_path / "history.jsonl"))
    yield made
    await made.close()
    made.recorder.close()


@pytest.fixture
async def one(fleet: Standins) -> str:
    """The only process that can be hit."""
    await fleet.add("query-2")
    return "query-2"


# ---- processes


async def test_kill_ends_a_process_and_its_port_and_brings_both_back(fleet: Standins, one: str) -> None:
    pid = fleet.members[one].process.pid
    async with NEMESES["kill"](fleet, random.Random(1)) as deed:
        assert deed.text == f"kill -9 {one}"
        assert fleet.members[one].process.exit_code == -9
        assert await fleet.is_refused(one)
    assert fleet.members[one].process.pid != pid and await fleet.ask(one, "1 + 1") == "2"
    assert not await fleet.is_refused(one)


async def test_kill_agents_ends_all_agents_and_nobody_else(fleet: Standins) -> None:
    await fleet.add(*AGENTS, "query-1")
    async with NEMESES["kill-agents"](fleet, random.Random(1)):
        assert [fleet.members[name].process.exit_code for name in AGENTS] == [-9] * 3
        assert fleet.members["query-1"].process.is_running()
    assert all(fleet.members[name].process.is_running() for name in AGENTS)


async def test_power_ends_everything(fleet: Standins) -> None:
    await fleet.add(*SERVICES)
    async with NEMESES["power"](fleet, random.Random(1)):
        assert [fleet.members[name].process.exit_code for name in SERVICES] == [-9] * len(SERVICES)
    assert all(fleet.members[name].process.is_running() for name in SERVICES)


async def test_pause_stops_a_process_and_lets_it_go_on(fleet: Standins, one: str) -> None:
    pid = fleet.members[one].process.pid
    async with NEMESES["pause"](fleet, random.Random(1)) as deed:
        assert deed.text == f"SIGSTOP {one}"
        await until(lambda: fleet.state_of(one) == "T")
    await until(lambda: fleet.state_of(one) in "RS")
    assert fleet.members[one].process.pid == pid


async def test_restart_is_orderly(fleet: Standins, one: str) -> None:
    pid = fleet.members[one].process.pid
    async with NEMESES["restart"](fleet, random.Random(1)):
        assert fleet.members[one].process.exit_code == 0
    assert fleet.members[one].process.pid != pid and fleet.members[one].process.is_running()
    fleet.recorder.close()
    assert not [event for event in read_history(fleet.work_dir / "history.jsonl") if isinstance(event, ProcessDied)]


# ---- disk


async def test_disk_full_leaves_no_byte(fleet: Standins, one: str) -> None:
    with pytest.raises(NotPossible):
        async with NEMESES["disk-full"](fleet, random.Random(1)):
            pass
    fleet.busy.clear()
    disk = fleet.work_dir / "disk"
    disk.mkdir()
    if not small_disk.mount(disk, 4 * 1024 * 1024):
        pytest.skip("this machine does not allow to mount a tmpfs")
    fleet.small_disk = disk  # unmounted by close()
    async with NEMESES["disk-full"](fleet, random.Random(1)) as deed:
        assert SMALL_DISK_AGENT in deed.text
        with pytest.raises(OSError) as caught:
            (disk / "log").write_bytes(b"x")
        assert caught.value.errno == ENOSPC
    assert (disk / "log").write_bytes(b"x") == 1


async def test_fsync_fails_for_one_agent(fleet: Standins) -> None:
    await fleet.add("ingest-2")
    call = "os.fsync(os.open('.', os.O_RDONLY))"
    assert await fleet.ask("ingest-2", call) == "None"
    async with NEMESES["fsync"](fleet, random.Random(1)) as deed:
        assert deed.text == "fsync fails for ingest-2"
        assert await fleet.ask("ingest-2", call) == EIO
        assert fleet.members["ingest-2"].may_die
    assert await fleet.ask("ingest-2", call) == "None"
    assert not fleet.members["ingest-2"].may_die


# ---- clocks


async def shift_s(fleet: Standins, name: str) -> float:
    return float(await fleet.ask(name, "time.time()")) - time.time()


@pytest.mark.parametrize(("name", "sign"), [("clock-forwards", 1), ("clock-backwards", -1)])
async def test_a_clock_jumps_and_jumps_back(fleet: Standins, one: str, name: str, sign: int) -> None:
    seen = []
    for seed in range(12):
        async with NEMESES[name](fleet, random.Random(seed)) as deed:
            said_s = float(deed.text.split()[-2])
            assert said_s * sign > 0 and one in deed.text
            assert await shift_s(fleet, one) == pytest.approx(said_s, abs=2)
            seen.append(abs(said_s))
        assert await shift_s(fleet, one) == pytest.approx(0, abs=2)
    assert min(seen) < 10 and max(seen) > 900, "small steps, and beyond what S3 bears"


async def test_a_clock_swings(fleet: Standins, one: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SWING_EVERY_S", (0.05, 0.1))
    async with NEMESES["clock-swings"](fleet, random.Random(2)) as deed:
        found: set[int] = set()
        while len(found) < 5:
            found.add(round(await shift_s(fleet, one)))
        assert min(found) < 0 < max(found)
    assert await shift_s(fleet, one) == pytest.approx(0, abs=2)
    assert int(deed.effect.split()[0]) >= 5


# ---- descriptors


async def test_a_process_can_open_nothing_more(fleet: Standins, one: str) -> None:
    opens = "[os.open('/', os.O_RDONLY) for _ in range({count})]"
    await fleet.ask(one, opens.format(count=30))  # there are holes below: these count as well
    await fleet.ask(one, "[os.close(number) for number in range(12, 30, 3)]")
    await until(lambda: not has_connections(fleet.members[one].listen))  # that of the question whether it serves
    for seed in range(4):
        asking = await fleet.open(one)
        asking[1].write(b"1\n")
        assert await asking[0].readline() == b"1\n", "accepted: its descriptor is not one of the spare ones"
        async with NEMESES["descriptors"](fleet, random.Random(seed)) as deed:
            spare = int(deed.text.split()[2])
            asking[1].write(f"len({opens.format(count=spare)})\n{opens.format(count=1)}\n".encode())
            async with asyncio.timeout(PATIENCE_S):
                assert int(await asking[0].readline()) == spare
                assert (await asking[0].readline()).decode().strip() == EMFILE
        await fleet.end(asking)
        assert (await fleet.ask(one, opens.format(count=1))).startswith("[")
        limits = resource.prlimit(fleet.members[one].process.pid, resource.RLIMIT_NOFILE)
        assert limits == (DESCRIPTORS_MAX, DESCRIPTORS_MAX)


async def test_silent_connections_use_up_descriptors(fleet: Standins, one: str) -> None:
    before = fleet.descriptors_of(one)
    async with NEMESES["silent-connections"](fleet, random.Random(1)) as deed:
        assert one in deed.text
        await until(lambda: fleet.descriptors_of(one) > before + 500)
    assert int(deed.effect.split()[0]) > 500
    await until(lambda: fleet.descriptors_of(one) < before + 50)
    assert await fleet.ask(one, "1 + 1") == "2"


# ---- helpers


def has_connections(listen: str) -> bool:
    """Returns True if a process has a descriptor of a connection to its port, whatever the other side did."""
    port = f":{int(listen.rpartition(':')[2]):04X}"
    rows = [line.split() for family in ("tcp", "tcp6") for line in Path(f"/proc/net/{family}").read_text().splitlines()]
    return any(row[1].endswith(port) and row[3] != LISTENING and row[9] != "0" for row in rows)


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():
            await asyncio.sleep(0.02)
