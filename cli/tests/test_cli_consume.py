"""streamhouse consume in a group: what it commits was printed."""

import asyncio

import pytest
from streamhouse import Producer
from streamhouse.commits import Commits
from streamhouse_cli import consume
from streamhouse_cli.position import PositionOption


async def fill(platform, address, count):
    await platform.create_topic("t", 1)
    async with Producer(address) as producer:
        await producer.send_many("t", [b"%d" % n for n in range(count)])


def reading(count_max, position="earliest", *, follow=False):
    return consume.Reading(
        topic="t",
        position=PositionOption(position),
        partition=None,
        group="g",
        follow=follow,
        count_max=count_max,
        skip_lost=False,
    )


@pytest.fixture
def stdout(monkeypatch):
    """What is printed; by a write that fails once `broken` is set."""

    class Stdout:
        broken = False
        written = b""

        async def write(self, data):
            await asyncio.sleep(0)
            if self.broken:
                raise BrokenPipeError
            self.written += data

    stdout = Stdout()
    monkeypatch.setattr(consume, "Output", lambda descriptor: stdout)
    return stdout


@pytest.mark.parametrize("count_max", [4, 10, None])
async def test_what_could_not_be_printed_is_not_committed(platform, address, stdout, count_max):
    await fill(platform, address, 10)
    stdout.broken = True
    with pytest.raises(BrokenPipeError):
        await consume._consume(address, reading(count_max), consume._json_lines)
    assert platform.group("g").offsets.get(("t", 0), 0) == 0
    stdout.broken = False
    await consume._consume(address, reading(count_max), consume._json_lines)
    count = count_max or 10
    assert stdout.written.count(b"\n") == platform.group("g").offsets["t", 0] == count


@pytest.mark.parametrize("follow", [False, True])
async def test_a_group_that_begins_at_the_end_keeps_where_that_was(platform, address, stdout, follow, monkeypatch):
    """Before any other commit: a command that was killed before anything came goes on there, and misses nothing."""

    async def never(commits, interval_ms):
        await asyncio.Event().wait()

    monkeypatch.setattr(Commits, "run", never)
    await fill(platform, address, 10)
    reads = asyncio.create_task(consume._consume(address, reading(None, "latest", follow=follow), consume._json_lines))
    async with asyncio.timeout(60):
        while platform.group("g").offsets != {("t", 0): 10}:
            await asyncio.sleep(0.01)
    if follow:
        reads.cancel()
    await asyncio.wait([reads])
    async with Producer(address) as producer:
        await producer.send_many("t", [b"new"] * 5)
    await consume._consume(address, reading(None, "latest"), consume._json_lines)
    assert stdout.written.count(b"new") == 5
    assert platform.group("g").offsets == {("t", 0): 15}
