"""The fuzz targets for some seconds, without coverage guidance: what CI can afford. Hypothesis picks the changes.

Memory is checked exactly here; the long run (python -m tests.fuzz.run) bounds it by the address space.
"""

import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shformat import BatchHeader, FormatError, Records, decode_batch, validate_batch

from tests.fuzz import calls, checksums
from tests.fuzz.target import ROOT, Finding, Hang, Target, cpu_limit, signature
from tests.fuzz.targets import MODULES, load

FORMATS = ("batch", "wal", "segment", "varint", "snapshot", "event")
EXAMPLES = 100
SERVICE_EXAMPLES = 40  # each is a handful of calls that PostgreSQL commits
CHANGES_MAX = 6
# Limits allow a payload of 1 MiB and 50,000 records at about 80 bytes of temporary columns each, for a handful of
# readers that hold their results side by side.
MEMORY_BYTES_MAX = 48 * 1024 * 1024

quick = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def changed(target: Target, seed: int, changes: int, *, repaired: bool) -> bytes:
    rng = Random(seed)
    data = rng.choice(target.seeds())
    for _ in range(changes):
        data = target.mutate(data, rng)
    data = data[: target.size_bytes_max]
    return target.repair(data) if repaired else data


def inputs(target: Target) -> st.SearchStrategy[bytes]:
    drawn = st.builds(
        lambda seed, changes, repaired: changed(target, seed, changes, repaired=repaired),
        st.integers(0, 1 << 64), st.integers(1, CHANGES_MAX), st.integers(0, 9).map(bool),
    )  # fmt: skip
    return st.one_of(drawn, drawn, drawn, st.binary(max_size=300), st.binary(max_size=300).map(target.repair))


@pytest.mark.parametrize("name", FORMATS)
def test_every_input_is_answered(name: str) -> None:
    target = load(name)

    @quick
    @given(inputs(target))
    def answered(data: bytes) -> None:
        with cpu_limit():
            target.check(data)

    for seed in target.seeds():
        target.check(seed)
    answered()


@pytest.mark.parametrize("name", FORMATS)
def test_no_input_takes_more_memory_than_the_limits_allow(name: str) -> None:
    target = load(name)
    tracemalloc.start()
    try:
        for seed in range(40):
            data = changed(target, seed, 1 + seed % CHANGES_MAX, repaired=True)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            target.check(data)
            grown = tracemalloc.get_traced_memory()[1] - before
            assert grown <= MEMORY_BYTES_MAX, f"seed {seed}: {grown} bytes for an input of {len(data)}"
    finally:
        tracemalloc.stop()


@pytest.mark.usefixtures("cluster")
@pytest.mark.integration
@pytest.mark.parametrize("name", ["ingest", "query", "coordinator"])
def test_services_answer_what_clients_say(name: str) -> None:
    target = load(name)

    @settings(quick, max_examples=SERVICE_EXAMPLES)
    @given(inputs(target))
    def answered(data: bytes) -> None:
        target.check(data)  # has a limit of its own per call

    for data in target.seeds():
        target.check(data)
    answered()


def test_all_targets_load_under_their_names() -> None:
    assert [load(name).name for name in MODULES] == list(MODULES)


# ---- a fuzzer that finds nothing proves nothing: what it must find


def finds(name: str, tries: int = 6_000) -> str:
    """The signature of the first finding within `tries` inputs; empty where there is none."""
    target = load(name)
    for seed in range(tries):
        try:
            target.check(changed(target, seed, 1 + seed % CHANGES_MAX, repaired=True))
        except Exception as error:  # noqa: BLE001 - whatever it is, it was found
            return signature(error)
    return ""


def _lenient(data: bytes, *arguments: object) -> BatchHeader:
    try:
        return validate_batch(data, *arguments)  # type: ignore[arg-type]
    except FormatError as error:
        if "UTF-8" in error.what:
            raise IndexError("a bug behind the checksum, in the names of headers") from error
        raise


def _forgetful(batches: list[memoryview], *arguments: object) -> Records:
    return decode_batch(batches[0], *arguments)  # type: ignore[arg-type]


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "patched", "bug"),
    [
        ("batch", "tests.fuzz.formats.validate_batch", _lenient),
        ("batch", "tests.fuzz.formats.decode_batches", _forgetful),
        ("wal", "tests.fuzz.formats.validate_batch", _lenient),
        ("segment", "shformat.segment_reader.check_agreement", lambda header, index: None),
        ("segment", "shformat.segment_reader.check_block", lambda block, entry, limits: None),
        ("varint", "shformat.varint._refuse_overflow", lambda *_: None),
    ],
)
def test_a_planted_bug_is_found(
    name: str, patched: str, bug: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert finds(name, 100) == "", "found without the bug"
    monkeypatch.setattr(patched, bug)
    assert finds(name)


def test_a_loop_without_end_is_a_hang() -> None:
    with pytest.raises(Hang, match="CPU"), cpu_limit(0.05):
        while True:
            pass


def test_an_allocation_beyond_the_limit_fails() -> None:
    """In a process of its own: the limit stays."""
    code = (
        "from tests.fuzz.target import limit_memory; limit_memory(64 << 20); bytearray(32 << 20); bytearray(256 << 20)"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.stderr.strip().endswith("MemoryError")


# ---- the tools themselves


def test_repaired_inputs_reach_behind_the_checksums() -> None:
    """Of inputs changed once, most must fail for what they say, not for a CRC."""
    for name, read in (("batch", validate_batch),):
        target = load(name)
        reasons = [_reason(read, changed(target, seed, 1, repaired=True)) for seed in range(300)]
        assert sum("CRC" in reason for reason in reasons) < 30
        assert len(set(reasons)) > 30


def _reason(read: Callable[[bytes], object], data: bytes) -> str:
    try:
        read(data)
    except FormatError as error:
        return error.what
    return ""


@pytest.mark.parametrize(
    ("repair", "name"),
    [(checksums.repair_batches, "batch"), (checksums.repair_wal, "wal"), (checksums.repair_segment, "segment")],
)
def test_repairing_what_is_whole_changes_nothing(repair: Callable[[bytes], bytes], name: str) -> None:
    for data in load(name).seeds():
        assert repair(data) == data


def test_calls_survive_their_encoding() -> None:
    for name in ("ingest", "query", "coordinator"):
        for data in load(name).seeds():
            sequence = calls.decode_calls(data)
            assert sequence
            assert calls.encode_calls(sequence) == data
    assert calls.decode_calls(b"\x05\0\0\0\0Wrong") == []


def test_signatures_tell_causes_apart_and_not_inputs() -> None:
    def fail(error: Exception) -> str:
        try:
            raise error
        except Exception as caught:  # noqa: BLE001 - its traceback is needed
            return signature(caught)

    assert fail(IndexError("1")) == fail(IndexError("2")) != fail(KeyError("1"))
    assert fail(Finding("rows differ")) != fail(Finding("a gap"))
