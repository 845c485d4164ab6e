"""Helpers of all benches: the machine, CPU and memory of processes, tables and JSON."""

import asyncio
import json
import os
import platform
import signal
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

CLOCK_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
MIB = 1024 * 1024
console = Console(highlight=False)


class Wrong(Exception):
    """A promise does not hold (records are lost, say): the bench fails. Slowness is no error."""


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> int:
    """Runs `main`; returns the exit code. Ctrl-C and SIGTERM cancel it, so that it ends the processes it started."""

    async def guarded() -> int:
        task = asyncio.create_task(main())
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        try:
            await task
        except Wrong as error:
            console.print(f"[red]wrong:[/red] {error}")
            return 1
        except asyncio.CancelledError:
            console.print("stopped")
            return 130
        return 0

    return asyncio.run(guarded())


def load_average() -> float:
    """Returns the load average of the last minute: other work on this machine distorts wall-clock figures."""
    return os.getloadavg()[0]


# ---- processes


@dataclass(frozen=True, slots=True)
class Usage:
    """cpu_s: user and system so far. private_mib: memory that is its own. file_mib: mapped files, which the kernel
    takes back as it likes; they are no memory that a limit could cover."""

    cpu_s: float
    private_mib: float
    file_mib: float


def usage(pid: int) -> Usage:
    """Returns the usage of one process, from /proc. Raises FileNotFoundError, ProcessLookupError once it is gone."""
    # The name, in parentheses, may hold spaces; utime and stime are fields 14 and 15.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    kib = {name: int(text.split()[0]) for name, _, text in (line.partition(":") for line in lines) if "Rss" in name}
    private_kib = kib["RssAnon"] + kib["RssShmem"]
    return Usage(ticks / CLOCK_TICKS_PER_S, private_kib / 1024, kib["RssFile"] / 1024)


def tree_cpu_s(pid: int) -> float:
    """Returns the CPU seconds so far of a process, its descendants, and the ended children that it has waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own_s = sum(map(int, fields[11:15])) / CLOCK_TICKS_PER_S
    return own_s + sum(map(tree_cpu_s, children(pid)))


def children(pid: int) -> list[int]:
    """Returns the processes that it started and that still run."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


# ---- results


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table: the first column is text, the others are numbers; the title says how busy the machine was."""
    table = Table(title=f"{title}; {os.cpu_count()} cores, load {load_average():.1f}", title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def write_json(path: Path | None, options: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
    """Writes the figures, the options and the machine; nothing without a path."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {"cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()},
        "load_average": os.getloadavg(),
        "options": {name: value if isinstance(value, int | float) else str(value) for name, value in options.items()},
        "figures": figures,
    }
    path.write_text(json.dumps(result, indent=2) + "\n")
