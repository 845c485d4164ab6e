"""What only the local directory does: durability, leftovers, full and read-only disks."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from shstore import (
    KeyInvalid,
    KeysRefused,
    LocalStore,
    ObjectExists,
    StoreDenied,
    StoreError,
    StoreInvalid,
    StoreOptions,
    StoreUnavailable,
    local,
)
from shstore.local_files import TempFile, store_error


def open_local(path: Path) -> LocalStore:
    return LocalStore(StoreOptions(kind="local", path=path))


async def test_objects_outlive_the_store(tmp_path: Path) -> None:
    await open_local(tmp_path).put("data/t/0/a.seg", [b"kept"])
    again = open_local(tmp_path)
    assert await again.get("data/t/0/a.seg") == b"kept"
    with pytest.raises(ObjectExists):
        await again.put("data/t/0/a.seg", [b"other"])


async def test_leftovers_are_removed_but_not_files_in_use(tmp_path: Path) -> None:
    temps = tmp_path / "tmp"
    temps.mkdir()
    (temps / "1-dead").write_bytes(b"half an object")
    with TempFile(temps) as living:
        await open_local(tmp_path).check()
        assert [path.name for path in temps.iterdir()] == [living.path.name]
    assert list(temps.iterdir()) == []


async def test_nothing_is_left_in_tmp(tmp_path: Path) -> None:
    store = open_local(tmp_path)
    await store.check()
    await store.put("k", [b"1"])
    await store.put("k", [b"2"], if_absent=False)
    with pytest.raises(ObjectExists):
        await store.put("k", [b"3"])
    assert list((tmp_path / "tmp").iterdir()) == []


async def test_many_buffers_in_one_put(tmp_path: Path) -> None:
    store = open_local(tmp_path)
    parts = [bytes([number % 256]) * (number % 7) for number in range(5000)]
    await store.put("k", parts)
    assert await store.get("k") == b"".join(parts)


async def test_a_key_cannot_be_a_directory_too(tmp_path: Path) -> None:
    store = open_local(tmp_path)
    await store.put("a/b", [b"x"])
    for if_absent in (True, False):
        with pytest.raises(KeyInvalid, match="directory of other keys"):
            await store.put("a", [b"x"], if_absent=if_absent)
        with pytest.raises(KeyInvalid, match="below another object"):
            await store.put("a/b/c", [b"x"], if_absent=if_absent)
        with pytest.raises(KeyInvalid, match="below another object"):
            await store.put("a/b/c/d", [b"x"], if_absent=if_absent)


async def test_foreign_files_and_links_are_not_objects(tmp_path: Path) -> None:
    store = open_local(tmp_path / "store")
    await store.put("a/k", [b"x"])
    secret = tmp_path / "secret"
    secret.write_bytes(b"outside")
    objects = tmp_path / "store" / "objects"
    (objects / "link").symlink_to(secret)
    (objects / "up").symlink_to(tmp_path)
    os.mkfifo(objects / "pipe")
    (objects / "bad\nname").write_bytes(b"")
    (objects / os.fsdecode(b"\xff\xfe")).write_bytes(b"")
    assert [info.key async for info in store.list("")] == ["a/k"]
    for key in ("link", "pipe"):
        with pytest.raises(StoreError):
            await store.get(key)


async def test_directories_removed_by_someone_come_back(tmp_path: Path) -> None:
    store = open_local(tmp_path)
    await store.put("a/k", [b"x"])
    for directory in ("objects/a", "tmp"):
        shutil.rmtree(tmp_path / directory)
    with pytest.raises(StoreUnavailable):
        await store.put("a/k", [b"x"])
    await store.put("a/k", [b"y"])
    assert await store.get("a/k") == b"y"
    shutil.rmtree(tmp_path)
    with pytest.raises(StoreUnavailable):
        await store.delete(["a/k"])
    await store.delete(["a/k"])


async def test_a_delete_names_what_it_may_not_delete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a file that an administrator made immutable, which needs a privilege and a file system that knows it."""
    store = LocalStore(StoreOptions(kind="local", path=tmp_path))
    for key in ("a/1", "a/2", "b/3"):
        await store.put(key, [b"x"])
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.name == "2":
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(KeysRefused, match="1 objects were not deleted, the first 'a/2'") as caught:
        await store.delete(["a/1", "a/2", "b/3"])
    assert caught.value.keys == ("a/2",)
    assert [info.key async for info in store.list("")] == ["a/2"]


async def test_a_delete_leaves_no_empty_directories(tmp_path: Path) -> None:
    store = open_local(tmp_path)
    for key in ("a/b/c/1", "a/b/2", "d/3"):
        await store.put(key, [b"x"])
    objects = tmp_path / "objects"

    def directories() -> set[str]:
        return {str(path.relative_to(objects)) for path in objects.rglob("*") if path.is_dir()}

    await store.delete(["a/b/c/1", "a/b/c/not-there"])
    assert directories() == {"a", "a/b", "d"}
    await store.delete(["a/b/2", "d/3"])
    assert directories() == set() and objects.is_dir()
    await store.put("a", [b"a key now"])
    assert [info.key async for info in store.list("")] == ["a"]


async def test_puts_do_not_notice_that_directories_come_and_go(tmp_path: Path) -> None:
    """Two stores, as two processes have them; each delete empties the directory that the other one puts into."""

    async def come_and_go(name: str) -> None:
        store = open_local(tmp_path)
        for number in range(150):
            key = f"data/t/0/{name}-{number}"
            await store.put(key, [name.encode()])
            assert await store.get(key) == name.encode()
            await store.delete([key])

    await asyncio.gather(*(come_and_go(name) for name in "abcd"))
    assert [*(tmp_path / "objects").iterdir()] == []


async def test_a_directory_that_others_made_anew_is_made_durable_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(local, "sync_directory", synced.append)
    ours, theirs = open_local(tmp_path), open_local(tmp_path)
    await ours.put("a/b/1", [b"x"])
    await ours.put("a/b/2", [b"x"])
    await theirs.delete(["a/b/1", "a/b/2"])
    await theirs.put("a/b/3", [b"x"])
    synced.clear()
    await ours.put("a/b/4", [b"x"])
    objects = tmp_path / "objects"
    assert {objects, objects / "a", objects / "a" / "b"} <= set(synced), "theirs may not be there after a power loss"
    synced.clear()
    await ours.put("a/b/5", [b"x"])
    assert synced == [objects / "a" / "b"]


async def test_two_processes_race_for_keys(tmp_path: Path) -> None:
    script = """
import asyncio, sys
from pathlib import Path
from shstore import LocalStore, ObjectExists, StoreOptions
async def main():
    store = LocalStore(StoreOptions(kind="local", path=Path(sys.argv[1])))
    for number in range(100):
        try:
            await store.put(f"k/{number:03}", [sys.argv[2].encode()])
            print(number)
        except ObjectExists:
            pass
asyncio.run(main())
"""
    racers = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", script, str(tmp_path), name, stdout=asyncio.subprocess.PIPE
        )
        for name in ("one", "two")
    ]
    outputs = [(await racer.communicate())[0] for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    one, two = ({int(line) for line in output.split()} for output in outputs)
    assert one | two == set(range(100))
    assert not one & two
    store = open_local(tmp_path)
    assert {number for number in range(100) if await store.get(f"k/{number:03}") == b"one"} == one


async def test_a_path_that_cannot_be_a_store_is_refused_clearly(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreInvalid, match=f"cannot use the directory {tmp_path}/file/x: Not a directory"):
        await open_local(tmp_path / "file" / "x").check()


def on_tmpfs(directory: Path, options: str, script: str) -> str:
    """Run `script` where `directory` is a tmpfs of its own (in a user namespace: no root needed)."""
    unshare = ["unshare", "-Urm", "--propagation", "private", "sh", "-c"]
    probe = subprocess.run([*unshare, f"mount -t tmpfs none {directory}"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"no user namespace with a tmpfs here: {probe.stderr.strip()}")
    ran = subprocess.run(
        [*unshare, f'mount -t tmpfs -o {options} none {directory} && exec "$0" -c "$1" {directory}',
         sys.executable, script],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_a_full_disk_is_unavailable_and_leaves_nothing(tmp_path: Path) -> None:
    script = """
import asyncio, os, sys
from pathlib import Path
from shstore import LocalStore, StoreOptions, StoreUnavailable
async def main():
    root = Path(sys.argv[1])
    store = LocalStore(StoreOptions(kind="local", path=root))
    await store.put("small", [b"x" * 1000])
    try:
        await store.put("big", [os.urandom(1 << 20)] * 3)
    except StoreUnavailable as exc:
        print(exc, "| retriable", exc.retriable)
    assert list((root / "tmp").iterdir()) == []
    assert [info.key async for info in store.list("")] == ["small"]
    await store.put("fits", [b"y" * 100_000])
asyncio.run(main())
"""
    output = on_tmpfs(tmp_path, "size=2m", script)
    assert "cannot put 'big': No space left on device (ENOSPC): the disk or quota is full" in output
    assert "retriable True" in output


def test_a_read_only_disk_is_denied(tmp_path: Path) -> None:
    script = """
import asyncio, sys
from pathlib import Path
from shstore import LocalStore, StoreOptions, StoreDenied
try:
    asyncio.run(LocalStore(StoreOptions(kind="local", path=Path(sys.argv[1]) / "store")).check())
except StoreDenied as exc:
    print(exc)
"""
    assert "Read-only file system" in on_tmpfs(tmp_path, "ro", script)


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, StoreUnavailable),
        (errno.EDQUOT, StoreUnavailable),
        (errno.EIO, StoreUnavailable),
        (errno.EMFILE, StoreUnavailable),
        (errno.EACCES, StoreDenied),
        (errno.EROFS, StoreDenied),
        (errno.ENAMETOOLONG, StoreInvalid),
    ],
)
def test_what_system_errors_mean(number: int, kind: type[StoreError]) -> None:
    error = store_error("put 'k'", OSError(number, os.strerror(number)))
    assert type(error) is kind
    assert os.strerror(number) in str(error)
