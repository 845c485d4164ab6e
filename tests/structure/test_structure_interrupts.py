"""Processes that tests, bench and demo start heed SIGINT, also when a shell script runs all of it in the background."""

import ast
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = sorted(
    path
    for top in ("bench", "demo", "tests")
    for path in (ROOT / top).rglob("*.py")
    if '__name__ == "__main__"' in path.read_text() and path != Path(__file__)
)
# They start no process.
START_NONE = {
    "bench/codec.py",
    "bench/loads/__main__.py",
    "tests/faults/checker.py",
    "tests/faults/standin.py",
    "tests/fuzz/child.py",
    "tests/integration/moto_process.py",
}
TELL = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"


def begins_with_it(source: str) -> bool:
    """True if the program's first step, behind `if __name__ == "__main__"`, is restore_sigint()."""
    block = next(node for node in reversed(ast.parse(source).body) if isinstance(node, ast.If))
    return ast.unparse(block.body[0]) == "restore_sigint()"


def test_programs_restore_sigint_before_they_start_others() -> None:
    names = {path.relative_to(ROOT).as_posix(): path for path in PROGRAMS}
    assert len(names) > 15 and names.keys() >= START_NONE
    assert [name for name in names if name not in START_NONE and not begins_with_it(names[name].read_text())] == []


def test_the_programs_that_start_none_do_not() -> None:
    for name in START_NONE:
        assert "subprocess" not in (ROOT / name).read_text() and "ServeProcess" not in (ROOT / name).read_text(), name


def test_a_program_that_does_not_restore_it_is_seen() -> None:
    assert not begins_with_it('if __name__ == "__main__":\n    main()\n    restore_sigint()\n')
    assert begins_with_it('if __name__ == "__main__":\n    restore_sigint()\n    main()\n')


def test_a_process_of_a_test_heeds_sigint() -> None:
    """Run by itself, and by the next test with SIGINT ignored."""
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    told = subprocess.run([sys.executable, "-c", TELL], capture_output=True, text=True, timeout=60, check=True)
    assert told.stdout == "True\n"


@pytest.mark.long
@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_suite_in_the_background_of_a_script_heeds_sigint(workers: str) -> None:
    inner = f"{Path(__file__).relative_to(ROOT)}::{test_a_process_of_a_test_heeds_sigint.__name__}"
    pytest_command = [sys.executable, "-m", "pytest", "-q", "-n", workers, "-p", "no:cacheprovider", inner]
    command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *pytest_command]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
